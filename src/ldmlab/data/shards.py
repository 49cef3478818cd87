"""Folders of shards, on this disk or elsewhere, and their samples, each read by its byte range.

Elsewhere: `s3://bucket/prefix`, `gs://`, `https://`, `file://` and every other protocol of fsspec; `pipe:COMMAND` whose
output is a shard; a brace pattern, `FOLDER/train-{000000..000999}.tar`, names some shards of a folder or an address.
Credentials and endpoints are those of the environment (AWS_*, FSSPEC_S3_*, ...).
"""

import re
from collections import OrderedDict
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, Any

import google_crc32c
import numpy as np

from ldmlab.data.manifest import MANIFEST, Manifest, check_shards, read_manifest
from ldmlab.data.shard_cache import ShardCache
from ldmlab.data.shard_info import PLACES, byte_range, map_places, read_places
from ldmlab.data.tars import Files, parse_sample, read_bytes
from ldmlab.data.transfers import PIPE, NotThere, download, is_address, key_of, sizes_at, stamp_at
from ldmlab.disks import open_regular
from ldmlab.errors import InputError

_MOST_NAMES = 1_000_000  # that a pattern may stand for
_TAR_OF_COMMAND = re.compile(r"[^\s/'\"=]+\.tar\b")
_FETCHED: dict[str, Path] = {}  # small files of this process, by address


@dataclass(frozen=True)
class Store:
    """Some or all shards of a folder, an address or a command; as text, what the user gave."""

    given: str  # as typed
    option: str  # its name in messages
    base: str  # folder or address; of a command the text with a zero byte in place of the shard's name
    cache: ShardCache
    names: tuple[str, ...] | None = None  # of the pattern; None: all

    def __str__(self) -> str:
        return self.given

    @property
    def local(self) -> Path | None:
        """The folder, where the shards lie on this disk."""
        return None if is_address(self.base) else Path(self.base)

    def url(self, name: str) -> str:
        """Address of one of its files; a command takes only names that were typed, see `subset`."""
        return self.base.replace("\0", name) if "\0" in self.base else f"{self.base}/{name}"

    def child(self, name: str) -> "Store":
        return replace(self, given=f"{self.given}/{name}", base=f"{self.base}/{name}")

    def file(self, name: str) -> Path:
        """A small file, such as the manifest, as it is now; fetched once by a process."""
        if self.local is not None:
            return self.local / name
        url = self.url(name)
        if url not in _FETCHED:
            mark = None if url.startswith(PIPE) else stamp_at(url, self.option)
            _FETCHED[url] = self.cache.file(key_of(self.base), name, mark, lambda path: self.fetch(name, path))
        return _FETCHED[url]

    def subset(self, manifest: Manifest) -> Manifest:
        """The manifest of the shards that the pattern names."""
        if strange := [shard.name for shard in manifest.shards if "::" in shard.name]:
            raise InputError(f"{self.option}={self}: shard {strange[0]!r} has no name of a file in its folder.")
        if self.names is None:
            return manifest
        known = {shard.name: shard for shard in manifest.shards}
        if missing := [name for name in self.names if name not in known]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{self.option}={self} names {missing[0]}{more}, which the {MANIFEST} beside it does not list (its "
                f"shards are {manifest.shards[0].name} .. {manifest.shards[-1].name}); correct the pattern, or write "
                "the manifest anew with `ldmlab index`."
            )
        if manifest.places_sha256:
            places = read_places(self.file(PLACES).parent, manifest.shards, manifest.places_sha256)
            ends = accumulate(shard.samples for shard in manifest.shards)
            known = {
                shard.name: replace(shard, places=places[end - shard.samples : end])
                for shard, end in zip(manifest.shards, ends, strict=True)
            }
        some = [known[name] for name in self.names]
        return replace(manifest, shards=some, places_sha256=None, hash_as_read=None)

    def sizes(self) -> dict[str, int] | None:
        """Bytes of the files by name, in one listing; None where the protocol has none."""
        if self.base.startswith((PIPE, "http://", "https://")):
            return None
        return sizes_at(self.base, self.option)

    def opened(self, name: str, size: int, sha256: str) -> AbstractContextManager[IO[bytes]]:
        """A shard, open for reading; it is not removed from the cache meanwhile."""
        return self.cache.opened(sha256, size, lambda path: self.fetch(name, path, size, sha256))

    def fetch_ahead(self, name: str, size: int, sha256: str) -> None:
        """Bring a shard into the cache, unless another process is at it."""
        self.cache.bring(sha256, size, lambda path: self.fetch(name, path, size, sha256), wait=False)

    def fetch(self, name: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
        """Write one of its files to `path`, whole, as far as its size and checksum are known."""
        download(self.url(name), path, self.option, size, sha256)


Folder = Path | Store


def beside(folder: Folder, name: str) -> Path:
    """The folder on this disk with a small file that lies beside the shards; of a store it is fetched first."""
    return folder.file(name).parent if isinstance(folder, Store) else folder


def manifest_of(folder: Folder | str, option: str = "data") -> Manifest:
    """The manifest of a folder or a store, of a pattern with its shards alone."""
    if not isinstance(folder, Store):
        return read_manifest(folder, option)
    try:
        place = beside(folder, MANIFEST)
    except NotThere:
        written = "the folder of the shards" if "\0" in folder.base else folder.base
        raise InputError(
            f"{option}={folder} has no {MANIFEST} beside its shards; write it with `ldmlab index {written}`."
        ) from None
    try:
        manifest = read_manifest(place, option)
    except InputError as error:
        raise InputError(str(error).replace(str(place), folder.base.replace("\0", MANIFEST))) from None
    return folder.subset(manifest)


def has_manifest(folder: Folder) -> bool:
    try:
        return (beside(folder, MANIFEST) / MANIFEST).exists()
    except NotThere:
        return False


def check_there(folder: Folder | str, manifest: Manifest, sha256: bool = False) -> None:
    """`check_shards`; of a store the sizes, where it lists them: sums are checked as the shards arrive."""
    if not isinstance(folder, Store) or folder.local is not None:
        check_shards(folder.base if isinstance(folder, Store) else folder, manifest, sha256)
        return
    if (sizes := folder.sizes()) is None:
        return
    for shard in manifest.shards:
        if (size := sizes.get(shard.name)) != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not the {shard.bytes} of its manifest"
            raise InputError(f"shard {folder.url(shard.name)} {found}; copy it again, or {manifest.remedy}.")


def shards_at(text: str, option: str, cache: ShardCache) -> Path | Store:
    """What an option that takes shards names: a folder of this disk, or a store."""
    if text.startswith(PIPE):
        found = list(_TAR_OF_COMMAND.finditer(text))
        if len(found) != 1:
            raise InputError(
                f"{option}={text} names {len(found)} shards; give a command with one NAME.tar or pattern, such as "
                '"pipe:ssh host cat shards/train-{000000..000999}.tar".'
            )
        base = f"{text[: found[0].start()]}\0{text[found[0].end() :]}"
        return Store(text, option, base, cache, _expanded(found[0][0], f"{option}={text}"))
    folder, _, last = text.rpartition("/")
    pattern = "{" in last and not Path(text).exists()
    if not is_address(text) and not pattern:
        return Path(text)
    if pattern or last.endswith(".tar"):
        return Store(text, option, folder or ".", cache, _expanded(last, f"{option}={text}"))
    return Store(text, option, text.rstrip("/"), cache)


def _expanded(pattern: str, named: str) -> tuple[str, ...]:
    from braceexpand import braceexpand

    try:
        names = tuple(islice(braceexpand(pattern), _MOST_NAMES + 1))
    except (ValueError, MemoryError) as error:
        raise InputError(f"{named} is no brace pattern ({error}); write NAME-{{000000..000999}}.tar.") from None
    if len(names) > _MOST_NAMES or any(not name.endswith(".tar") for name in names) or len({*names}) < len(names):
        raise InputError(f"{named} does not name at most {_MOST_NAMES} different tars; write NAME-{{000..999}}.tar.")
    return names


OPEN_SHARDS = 32  # file handles kept per process


class ShardLost(InputError):
    """A shard of a store that cannot be had: it ends the run, unlike a bad sample."""


class ShardReader:
    """The samples of some shards, each one read of a byte range; safe to hand to forked and spawned workers.

    Places and checksums are an array that is mapped, and only the files used last stay open, so that memory and open
    files do not grow with the data. A sample whose bytes differ from the manifest's checksum is refused.
    """

    def __init__(self, folder: Folder, manifest: Manifest) -> None:
        self.folder = beside(folder, MANIFEST)  # on this disk; of a store without its shards
        self.store = folder if isinstance(folder, Store) and folder.local is None else None
        self._stored = [(shard.name, shard.bytes, shard.sha256) for shard in manifest.shards] if self.store else []
        self.names = [shard.name for shard in manifest.shards]
        self.counts = [shard.samples for shard in manifest.shards]
        self.ends = np.cumsum(self.counts)  # of each shard's samples, counted over all
        self._sizes = [shard.bytes for shard in manifest.shards]
        self._summed = [shard.summed for shard in manifest.shards]
        self._mapped = manifest.places_sha256 is not None
        if manifest.places_sha256:
            self._places = read_places(beside(folder, PLACES), manifest.shards, manifest.places_sha256)
        else:
            self._places = np.concatenate([shard.places for shard in manifest.shards if shard.places is not None])
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()

    def read(self, shard: int, sample: int) -> tuple[str, Files]:
        """Key and files of a sample; OSError, ValueError or tarfile's errors where the shard is damaged."""
        index = self.index(shard, sample)
        last = sample + 1 == self.counts[shard]
        with ExitStack() as held:
            file = self._file(shard, held)
            data = read_bytes(file.fileno(), *byte_range(self._places, index, last, self._sizes[shard]))
        if self._summed[shard] and google_crc32c.value(data) != self._places[index, 1]:
            raise OSError("its bytes differ from the manifest's checksum")
        return parse_sample(data, self.names[shard])

    def index(self, shard: int, sample: int) -> int:
        """Number of a sample, counted over all shards."""
        return int(self.ends[shard]) - self.counts[shard] + sample

    def label(self, shard: int, sample: int) -> str:
        """How messages name a sample whose key may be unreadable."""
        return f"{self.names[shard]}[{sample}]"

    def fault(self, shard: int, sample: int, error: Exception) -> str:
        """Which sample cannot be used and why, in a few words."""
        return f"{self.label(shard, sample)}: {type(error).__name__}: {str(error)[:200]}"

    def cached_gib(self, shards: int) -> float:
        """What so many of the largest shards take on this machine's disk; 0 where they lie there anyway."""
        return sum(sorted((size for _, size, _ in self._stored), reverse=True)[:shards]) / 2**30

    def fetch_ahead(self, shard: int) -> None:
        """Bring a shard of a store to this machine, unless another process is at it."""
        if self.store:
            self.store.fetch_ahead(*self._stored[shard])

    def _file(self, shard: int, held: ExitStack) -> IO[bytes]:
        """The open file of a shard; reads give their own offset, so processes may share it. One of a store is open,
        and safe from being removed, while it is `held`."""
        if self.store:
            try:
                return held.enter_context(self.store.opened(*self._stored[shard]))
            except (InputError, OSError) as error:
                raise ShardLost(str(error)) from None
        if shard not in self._open:
            self._open[shard] = open_regular(self.folder / self.names[shard])
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def __del__(self) -> None:
        for file in getattr(self, "_open", {}).values():
            file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict(), "_places": None if self._mapped else self._places}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        if self._mapped:
            self._places = map_places(self.folder)
