"""Shards: tars whose samples are byte ranges. Scan one made by anyone, read single samples, write new ones.

Every size that a tar states is checked against the bytes that are there, compression and sparse files are refused, and
no member is ever extracted to disk.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import numpy as np

from ldmlab.data.manifest import Manifest, ShardInfo
from ldmlab.errors import InputError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "heic", "pgm", "ppm")
_BLOCK = 512  # tar pads headers and contents to this
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # key and ending, as webdataset splits them
_SKIPPED = re.compile(r"__[^/]*__($|/)")  # names webdataset's reader leaves out
_READ_BYTES = 1 << 20


@dataclass
class TarScan:
    """What one pass over a tar found."""

    keys: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # first header of each sample
    bytes: int = 0
    sha256: str = ""


class _Hashed:
    """A file read once from start to end, with its checksum and length."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.bytes, self.tail = file, hashlib.sha256(), 0, b""

    def read(self, size: int = _READ_BYTES) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        self.tail = (self.tail + data)[-2 * _BLOCK :]
        return data


Visit = Callable[[str, str, bytes], None]  # key, ending, content


def scan_tar(path: Path, visit: Visit | None = None) -> TarScan:
    """Keys, offsets, size and checksum of a tar made by anyone, in one sequential read."""
    try:
        with open(path, "rb") as raw:
            if raw.read(2) == b"\x1f\x8b":
                raise InputError(
                    f"shard {path} is compressed, so samples cannot be found in it; unpack it with gunzip."
                )
            raw.seek(0)
            return _scan(path, _Hashed(raw), visit)
    except (OSError, tarfile.TarError) as error:
        raise InputError(f"shard {path} cannot be read ({error}); fetch it again or leave it out.") from None


def _scan(path: Path, file: _Hashed, visit: Visit | None) -> TarScan:
    scan, seen, end = TarScan(), set[str](), 0
    with tarfile.open(fileobj=cast(IO[bytes], file), mode="r|", bufsize=_READ_BYTES) as tar:
        for member in tar:
            cast(Any, tar).members = []  # or the list of all headers grows with the tar
            end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
            parts = _NAME.fullmatch(member.name)
            if not member.isreg() or parts is None or _SKIPPED.match(member.name):
                continue
            key, ending = parts.groups()
            if not scan.keys or key != scan.keys[-1]:
                if key in seen:
                    raise InputError(f"shard {path}: the files of key {key} are not next to each other; sort the tar.")
                seen.add(key)
                scan.keys.append(key)
                scan.offsets.append(member.offset)
            if visit is not None and (content := tar.extractfile(member)) is not None:
                visit(key, ending.lower(), content.read())
    while file.read():
        pass
    if end + 2 * _BLOCK > file.bytes or file.tail.strip(b"\0"):
        raise InputError(f"shard {path} is cut off: it has {file.bytes} bytes and no end marker; fetch it again.")
    scan.bytes, scan.sha256 = file.bytes, file.digest.hexdigest()
    return scan


def read_range(path: Path | str, start: int, end: int) -> dict[str, Any]:
    """The one sample in bytes [start, end) of a tar: `__key__` and ending => bytes."""
    with open(path, "rb") as file:
        file.seek(start)
        return parse_sample(file.read(end - start), str(path))


def parse_sample(data: bytes, url: str) -> dict[str, Any]:
    """Tar bytes of one sample => `__key__` and ending => bytes, undecoded."""
    from webdataset.tariterators import group_by_keys, tar_file_iterator  # here: it imports torch, which takes seconds

    files = ({**file, "__url__": url} for file in tar_file_iterator(io.BytesIO(data)))
    for sample in group_by_keys(files):
        return sample
    raise ValueError(f"no sample in the given bytes of {url}")


def image_ending(sample: dict[str, Any]) -> str | None:
    """The ending of the sample's image; maps such as `seg.png` are not it."""
    return next((ending for ending in sample if ending in IMAGE_ENDINGS), None)


def sample_fields(sample: dict[str, Any]) -> dict[str, Any]:
    """`KEY.json`, with the caption of `KEY.txt` and the class of `KEY.cls` where it has none."""
    fields: dict[str, Any] = json.loads(sample["json"]) if "json" in sample else {}
    if not isinstance(fields, dict):
        raise ValueError("KEY.json is not an object")
    if "txt" in sample and "caption" not in fields:
        fields["caption"] = sample["txt"].decode("utf-8-sig").strip()
    if "cls" in sample and "class_id" not in fields:
        fields["class_id"] = int(sample["cls"])
    return fields


def tar_bytes(name: str, content: bytes) -> bytes:
    """One tar member without owner and time, so that the same content gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _BLOCK)


END_MARKER = bytes(2 * _BLOCK)


class ShardFile:
    """One shard; either `finish` or `abandon` closes it."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by `finish` or `abandon`
        self._digest, self._bytes, self._offsets = hashlib.sha256(), 0, list[int]()

    def append(self, samples: bytes, offsets: Sequence[int] = (0,)) -> None:
        """Tar members of whole samples, and where in them each sample begins."""
        self._offsets += [self._bytes + offset for offset in offsets]
        self._write(samples)

    def finish(self) -> ShardInfo | None:
        """The shard under its own name; None, and no file, if it has no sample."""
        if not self._offsets:
            self.abandon()
            return None
        self._write(END_MARKER)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return ShardInfo(self._path.name, len(self._offsets), self._bytes, self._digest.hexdigest(), self._offsets)

    def abandon(self) -> None:
        """Leaves nothing of an unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)


OPEN_SHARDS = 32  # file handles kept per process

Files = dict[str, bytes]  # a sample's files by ending: {"webp": ..., "json": ...}


class ShardReader:
    """The samples of a folder of shards; safe to hand to forked and spawned workers."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.names = [shard.name for shard in manifest.shards]
        self.counts = [shard.samples for shard in manifest.shards]
        self._first = np.cumsum([0, *self.counts])  # where a shard's offsets begin
        self._offsets = np.fromiter((o for s in manifest.shards for o in s.offsets), np.int64, int(self._first[-1]))
        self._sizes = np.array([shard.bytes for shard in manifest.shards], np.int64)
        self._open: OrderedDict[int, io.FileIO] = OrderedDict()

    def read(self, shard: int, sample: int) -> tuple[str, Files]:
        """Key and files of a sample; OSError or tarfile's errors where the shard is damaged."""
        begin = int(self._offsets[self._first[shard] + sample])
        last = sample + 1 == self.counts[shard]
        end = int(self._sizes[shard] if last else self._offsets[self._first[shard] + sample + 1])
        data = os.pread(self._file(shard).fileno(), end - begin, begin)
        if len(data) < end - begin:
            raise OSError("the shard ends inside this sample")
        files = parse_sample(data, self.names[shard])
        return files.pop("__key__"), {name: value for name, value in files.items() if not name.startswith("__")}

    def index(self, shard: int, sample: int) -> int:
        """Number of a sample, counted over all shards."""
        return int(self._first[shard]) + sample

    def label(self, shard: int, sample: int) -> str:
        """How messages name a sample whose key may be unreadable."""
        return f"{self.names[shard]}[{sample}]"

    def _file(self, shard: int) -> io.FileIO:
        """The open file of a shard; reads give their own offset, so processes may share it."""
        if shard not in self._open:
            self._open[shard] = io.FileIO(self.folder / self.names[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}
