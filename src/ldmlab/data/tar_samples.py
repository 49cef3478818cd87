"""Samples as byte ranges of a tar: found by walking its headers once, read back with webdataset's tar iterators."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

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
