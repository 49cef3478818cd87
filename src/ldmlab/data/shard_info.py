"""A shard as manifests list it, and `manifest.places`: where each sample lies, mapped into memory.

The file holds two little-endian uint32 a sample, shard after shard: the 512-byte block of the tar where its first
header begins, and the CRC32C of its bytes. 100 million samples take 0.8 GB, of which a process has in memory only the
pages that it used last. Manifests of formats 1 and 2 list the same numbers in their JSON.
"""

import hashlib
import mmap
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldmlab.disks import open_regular
from ldmlab.errors import InputError
from ldmlab.files import write_atomically

PLACES = "manifest.places"
TAR_BLOCK = 512  # headers and contents are padded to this
Places = NDArray[np.uint32]  # (samples, 2): first block, CRC32C

_ROW = np.dtype("<u4")
_SAMPLE_BYTES = 2 * _ROW.itemsize
_MOST_BYTES = TAR_BLOCK << 32  # of a shard
# no half characters but those of other encodings
_NAME = re.compile("[^/\\\\\0\ud800-\udc7f\udd00-\udfff]{1,200}")


@dataclass(frozen=True)
class ShardInfo:
    """One tar; sample i ends where the next one begins, the last one at the tar's end."""

    name: str
    samples: int
    bytes: int
    sha256: str
    places: Places | None = field(default=None, compare=False, repr=False)  # None: in the file beside the manifest
    summed: bool = field(default=True, compare=False, repr=False)  # False: without checksums of samples, as in format 1

    @classmethod
    def of(cls, name: str, size: int, sha256: str, offsets: Sequence[int], sums: Sequence[int]) -> "ShardInfo":
        """A shard that was just written or scanned: byte offset and CRC32C of each sample."""
        return cls(name, len(offsets), size, sha256, _places(name, size, np.asarray(offsets, np.int64), sums))

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ShardInfo":
        """From the manifest; ValueError or TypeError where a value is none that we write."""
        info = cls(**row)
        if info.places is not None or not info.summed:
            raise ValueError(f"places of shard {str(info.name)[:80]!r} do not belong into the JSON")
        if not isinstance(info.name, str) or not _NAME.fullmatch(info.name) or info.name in (".", ".."):
            raise ValueError(f"shard {str(info.name)[:80]!r} has no name of a file in its folder")
        if not is_count(info.samples, 1) or not is_count(info.bytes, 1):
            raise ValueError(f"shard {info.name} has samples={info.samples!r:.40} and bytes={info.bytes!r:.40}")
        if not is_sha256(info.sha256):
            raise ValueError(f"shard {info.name} has no SHA-256")
        return info

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "ShardInfo":
        """From what `plain` gives, as manifests of formats 1 and 2 hold it; ValueError or TypeError as above."""
        row = {**plain}
        found, sums = row.pop("offsets"), row.pop("crc32c", "")
        info = cls.from_row(row)
        offsets: NDArray[Any] = np.array(found) if isinstance(found, list) else np.empty(0)
        if offsets.ndim != 1 or offsets.dtype.kind != "i":
            raise ValueError(f"offsets of shard {info.name} is no list of whole numbers")
        if len(offsets) != info.samples:
            raise ValueError(f"shard {info.name} has samples={info.samples} and {len(offsets)} offsets")
        if not isinstance(sums, str) or len(sums) not in (0, 8 * info.samples) or not re.fullmatch("[0-9a-f]*", sums):
            raise ValueError(f"shard {info.name} does not have one CRC32C per sample")
        values = np.frombuffer(bytes.fromhex(sums), ">u4") if sums else np.zeros(info.samples)
        places = _places(info.name, info.bytes, offsets, values)
        return cls(info.name, info.samples, info.bytes, info.sha256, places, bool(sums))

    @property
    def row(self) -> dict[str, Any]:
        """The entry of a manifest."""
        return {"name": self.name, "samples": self.samples, "bytes": self.bytes, "sha256": self.sha256}

    @property
    def plain(self) -> dict[str, Any]:
        """With its places, in plain types."""
        assert self.places is not None
        sums = self.places[:, 1].astype(">u4").tobytes().hex() if self.summed else ""
        return {**self.row, "offsets": [int(block) * TAR_BLOCK for block in self.places[:, 0]], "crc32c": sums}

    def byte_range(self, sample: int) -> tuple[int, int]:
        """First byte and end of a sample; the last one's end takes in the end marker, which tar readers stop at."""
        assert self.places is not None
        return byte_range(self.places, sample, sample + 1 == self.samples, self.bytes)


def byte_range(places: Places, index: int, last: bool, size: int) -> tuple[int, int]:
    """First byte and end of a sample, which may be the last one of a shard of `size` bytes."""
    return int(places[index, 0]) * TAR_BLOCK, size if last else int(places[index + 1, 0]) * TAR_BLOCK


def is_count(value: Any, least: int = 0, most: int = 1 << 62) -> bool:
    """Whether a value from a file is a whole number in a range."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_sha256(value: Any) -> bool:
    """Whether a value from a file is a hexadecimal SHA-256."""
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _places(name: str, size: int, offsets: NDArray[np.int64], sums: Any) -> Places:
    if size > _MOST_BYTES:
        raise ValueError(f"shard {name} has {size} bytes, more than the {_MOST_BYTES} of the longest shard")
    if (offsets % TAR_BLOCK).any():
        raise ValueError(f"an offset of shard {name} is no multiple of {TAR_BLOCK}, where headers of tars begin")
    blocks = offsets // TAR_BLOCK
    _check_rising(name, size, blocks)
    return np.stack([blocks, np.asarray(sums, np.int64)], axis=1).astype(_ROW)


def _check_rising(name: str, size: int, blocks: NDArray[Any]) -> None:
    if blocks[0] < 0 or int(blocks[-1]) * TAR_BLOCK >= size or not (blocks[:-1] < blocks[1:]).all():
        raise ValueError(f"the offsets of shard {name} do not rise from 0 to its {size} bytes")


def places_sha256(shards: Sequence[ShardInfo]) -> str:
    """SHA-256 of the file that `write_places` makes."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(_bytes(shard))
    return digest.hexdigest()


def _bytes(shard: ShardInfo) -> bytes:
    assert shard.places is not None
    assert shard.summed
    return shard.places.astype(_ROW, copy=False).tobytes()


def write_places(folder: Path, shards: Sequence[ShardInfo]) -> None:
    """Writes the file, by atomic rename."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.writelines(map(_bytes, shards))

    write_atomically(folder / PLACES, write)


def read_places(folder: Path, shards: Sequence[ShardInfo], sha256: str) -> Places:
    """All samples' places, mapped; InputError where the file is not that of the manifest, or the places are wrong.

    The check reads the file once, a shard at a time, and maps nothing.
    """
    path, digest = folder / PLACES, hashlib.sha256()
    again = "copy it and its manifest again, or pack or index the folder again."
    try:
        with open_regular(path) as file:
            found, expected = os.fstat(file.fileno()).st_size, _SAMPLE_BYTES * sum(shard.samples for shard in shards)
            if found != expected:
                raise ValueError(f"it has {found} bytes, not the {expected} of its manifest's samples")
            for shard in shards:
                rows = file.read(_SAMPLE_BYTES * shard.samples)
                digest.update(rows)
                _check_rising(shard.name, shard.bytes, np.frombuffer(rows, _ROW)[::2])
    except FileNotFoundError:
        raise InputError(f"{path} is missing although its manifest lists it; {again}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be used ({error}); {again}") from None
    if digest.hexdigest() != sha256:
        raise InputError(f"{path} has another checksum than its manifest records; {again}")
    return map_places(folder)


def map_places(folder: Path) -> Places:
    """The file, mapped as it is."""
    with open_regular(folder / PLACES) as file:
        if not os.fstat(file.fileno()).st_size:
            return np.empty((0, 2), _ROW)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), _ROW).reshape(-1, 2)
