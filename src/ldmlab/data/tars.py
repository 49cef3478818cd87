"""Tars whose samples are byte ranges: scan one made by anyone, read single samples, write new ones.

Every size that a tar states is checked against the bytes that are there, compressed and sparse tars are refused, and no
member is ever extracted to disk.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

from ldmlab.data.shard_info import TAR_BLOCK, ShardInfo
from ldmlab.disks import open_regular
from ldmlab.errors import InputError

IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "heic", "pgm", "ppm")
MAX_SAMPLE_BYTES = 1 << 28
END_MARKER = bytes(2 * TAR_BLOCK)
_LONGEST_TAIL = 10240 + 2 * TAR_BLOCK  # zeros after the last member: the end marker, padded to tar's usual record
_READ_BYTES = 1 << 20
_LONGEST_HEADER = 1 << 20  # of a long name or of extended attributes
_WITHOUT_CONTENT = b"123456"  # types of links, devices, folders and pipes
_LONG_NAME, _ATTRIBUTES, _HEADERS = b"L", b"x", b"LKxg"  # names and attributes of the member that follows
_PAX_RECORD = re.compile(rb"(\d{1,8}) ([^=]+)=")
_INTERNAL = re.compile("__.*__|__MACOSX")  # names that webdataset leaves out, and what macOS adds
_JUNK = ("thumbs.db", "desktop.ini")
_LAST_DOT = re.compile(r"(.*)\.((?:seg|mask)\.png|[a-z0-9]+\.states\.npy|[^.]*)", re.IGNORECASE | re.DOTALL)

Files = dict[str, bytes]  # a sample's files by ending: {"webp": ..., "json": ...}
Read = Callable[[int, int], bytes]  # offset, size => bytes, fewer at the end
Visit = Callable[[str, bytes], None]  # key, tar bytes of the sample


class Member(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its first header, long names included
    data: int  # offset of the content
    size: int


def tar_members(read: Read, end: int) -> Iterator[Member]:
    """The regular files of a tar of `end` bytes up to its end marker; sparse ones, links and folders are left out."""
    offset, first, long_name, attributes = 0, 0, "", dict[bytes, bytes]()
    while offset + TAR_BLOCK <= end and (header := read(offset, TAR_BLOCK)).strip(b"\0"):
        info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        size = int(attributes.get(b"size", info.size))
        stored = 0 if info.type in _WITHOUT_CONTENT else size
        data = offset + TAR_BLOCK
        if not 0 <= stored <= end - data:
            raise tarfile.ReadError(f"{info.name!r} has {size} bytes by its header, and {end - data} are left")
        offset = data + _padded(stored)
        if info.type in _HEADERS:
            if stored > _LONGEST_HEADER:
                raise tarfile.ReadError(f"a name or its attributes take {stored} bytes")
            if info.type == _LONG_NAME:
                long_name = read(data, stored).rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == _ATTRIBUTES:
                attributes = _pax_attributes(read(data, stored))
            continue
        name = attributes.get(b"path", b"").decode("utf-8", "surrogateescape") or long_name or info.name
        sparse = info.type == tarfile.GNUTYPE_SPARSE or any(key.startswith(b"GNU.sparse") for key in attributes)
        if info.isreg() and not sparse:
            yield Member(name, first, data, size)
        first, long_name, attributes = offset, "", {}


def _padded(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def _pax_attributes(data: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH NAME=VALUE\\n" of an extended header."""
    found, place = dict[bytes, bytes](), 0
    while record := _PAX_RECORD.match(data, place):
        length = int(record[1])
        if length <= record.end() - place:
            break
        found[record[2]] = data[record.end() : place + length - 1]
        place += length
    return found


def _split_name(name: str) -> tuple[str, str] | None:
    """Key and ending at the first dot of the file's name, as webdataset splits it; None for no file of a sample."""
    folder, slash, base = name.rpartition("/")
    parts = [part for part in name.split("/") if part not in (".", "..")]
    if any(part.startswith(".") or _INTERNAL.fullmatch(part) for part in parts) or base.lower() in _JUNK:
        return None
    stem, dot, ending = base.partition(".")
    return (f"{folder}{slash}{stem}", ending) if dot and stem else None


def _named(members: Iterable[Member]) -> Iterator[tuple[str, str, Member]]:
    """Key, ending and member of every file of a sample; files that share a first-dot key without an image of that
    name ("photo 2.0.jpg", "IMG.2020.0001.jpg") are split at their last dot instead."""
    split = ((parts, member) for member in members if (parts := _split_name(member.name)))
    for key, group in groupby(split, lambda entry: entry[0][0]):
        files = [(ending, member) for (_, ending), member in group]
        dotted = not any(ending.lower() in (*IMAGE_ENDINGS, "npy") for ending, _ in files) and any(
            ending.lower().rpartition(".")[2] in IMAGE_ENDINGS and ending.lower() not in ("seg.png", "mask.png")
            for ending, _ in files
        )
        for ending, member in files:
            last = _LAST_DOT.fullmatch(member.name) if dotted else None
            yield (last[1], last[2].lower(), member) if last else (key, ending.lower(), member)


def scan_tar(path: Path, visit: Visit | None = None) -> tuple[ShardInfo, list[str]]:
    """Entry in a manifest and keys of a tar made by anyone; `visit` gets MAX_SAMPLE_BYTES of each sample at most."""
    try:
        with open_regular(path) as file:
            if file.read(2) == b"\x1f\x8b":
                raise InputError(
                    f"shard {path} is compressed, so samples cannot be found in it; unpack it with gunzip."
                )
            size = os.fstat(file.fileno()).st_size
            return _scan(path, lambda offset, count: os.pread(file.fileno(), count, offset), size, visit)
    except InputError:
        raise
    except (OSError, tarfile.TarError, ValueError) as error:
        raise InputError(f"shard {path} cannot be read ({error}); fetch it again or leave it out.") from None


def _scan(path: Path, read: Read, size: int, visit: Visit | None) -> tuple[ShardInfo, list[str]]:
    members, starts, last = list(tar_members(read, size)), dict[str, int](), None
    for key, _, member in _named(members):
        if key != last and key in starts:
            raise InputError(f"shard {path}: the files of key {key} are not next to each other; sort the tar.")
        starts.setdefault(key, member.offset)
        last = key
    _check_end(path, read, members[-1].data + _padded(members[-1].size) if members else 0, size, len(starts))
    offsets, digest, sums = list(starts.values()), hashlib.sha256(), []
    _hash_range(digest, read, 0, offsets[0] if offsets else size)
    for key, (start, end) in zip(starts, pairwise([*offsets, size]), strict=True):
        sums.append(_hash_range(digest, read, start, end))
        if visit:
            visit(key, read(start, min(end - start, MAX_SAMPLE_BYTES)))
    if not offsets:
        return ShardInfo(path.name, 0, size, digest.hexdigest(), np.empty((0, 2), np.uint32)), []
    return ShardInfo.of(path.name, size, digest.hexdigest(), offsets, sums), list(starts)


def _check_end(path: Path, read: Read, end: int, size: int, samples: int) -> None:
    """Refuse a tar that was cut off, also one whose missing rest is zeros, as unfinished downloads leave it."""
    last = read(max(end, size - 2 * TAR_BLOCK), 2 * TAR_BLOCK)
    if end + 2 * TAR_BLOCK > size or last.strip(b"\0"):
        raise InputError(f"shard {path} is cut off: it has {size} bytes and no end marker; fetch it again.")
    if size - end > _LONGEST_TAIL and not read(end, TAR_BLOCK).strip(b"\0"):
        raise InputError(
            f"shard {path} ends in {size - end} bytes of zeros after its sample {samples}, as an unfinished download "
            f"does; fetch it again, or if it is whole, cut them off with `truncate -s {end + 2 * TAR_BLOCK} {path}`."
        )


def _hash_range(digest: Any, read: Read, start: int, end: int) -> int:
    """CRC32C of these bytes, which `digest` takes in too."""
    checksum = 0
    for begin in range(start, end, _READ_BYTES):
        data = read(begin, min(_READ_BYTES, end - begin))
        digest.update(data)
        checksum = google_crc32c.extend(checksum, data)
    return checksum


def read_range(path: Path | str, start: int, end: int) -> tuple[str, Files]:
    """The one sample in bytes [start, end) of a tar: its key and its files."""
    with open_regular(Path(path)) as file:
        return parse_sample(read_bytes(file.fileno(), start, end), str(path))


def read_bytes(descriptor: int, start: int, end: int) -> bytes:
    """Bytes [start, end) of an open tar; OSError where it ends before, or they are more than a sample has."""
    if end - start > MAX_SAMPLE_BYTES:
        raise OSError(f"the sample has {end - start} bytes; at most {MAX_SAMPLE_BYTES} are read")
    data = os.pread(descriptor, end - start, start)
    if len(data) < end - start:
        raise OSError("the shard ends inside this sample")
    return data


def parse_sample(data: bytes, url: str) -> tuple[str, Files]:
    """Tar bytes of one sample => its key and its files, undecoded."""
    first, files = "", Files()
    for key, ending, member in _named(tar_members(lambda offset, size: data[offset : offset + size], len(data))):
        if files and key != first:
            break
        if ending in files:
            raise tarfile.ReadError(f"two files {key}.{ending} in one sample")
        first, files[ending] = key, data[member.data : member.data + member.size]
    if not files:
        raise tarfile.ReadError(f"no sample in these bytes of {url}")
    return first, files


def image_ending(files: Files) -> str | None:
    """The ending of the sample's image; maps such as `seg.png` are not it."""
    return next((ending for ending in files if ending in IMAGE_ENDINGS), None)


def tar_bytes(name: str, content: bytes) -> bytes:
    """One tar member without owner and time, so that the same content gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(content), 0o644
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % TAR_BLOCK)
