"""Folders of shards that are no folder of this disk: an address of an object store or a server, a command, a pattern.

`s3://bucket/prefix`, `gs://`, `https://`, `file://` and every other protocol of fsspec; `pipe:COMMAND` whose output is
a shard; a brace pattern, `FOLDER/train-{000000..000999}.tar`, names some shards of a folder or an address. Files arrive
whole: a fault that may pass (time-outs, 5xx, broken connections, cut off bodies) is tried again with growing waits, any
other ends in its sentence at once. Credentials and endpoints are those of the environment (AWS_*, FSSPEC_S3_*, ...).
"""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice
from pathlib import Path
from typing import IO, Any, TypeVar

from ldmlab.data.manifest import MANIFEST, Manifest, check_shards, file_sha256, read_manifest
from ldmlab.data.shard_cache import ShardCache
from ldmlab.data.shard_info import PLACES, read_places
from ldmlab.errors import InputError
from ldmlab.files import FULL

T = TypeVar("T")
TRIES = 6
FIRST_WAIT_SECONDS = 1.0  # doubled after every try
_CONNECT_SECONDS, _READ_SECONDS = 20, 60  # of a server that says nothing
_MOST_NAMES = 1_000_000  # that a pattern may stand for
_PIPE = "pipe:"
_TAR_OF_COMMAND = re.compile(r"[^\s/'\"=]+\.tar\b")
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss")  # have no folders; making one could make a bucket
_IDENTITIES = ("ETag", "etag", "md5Hash", "mtime", "last_modified", "LastModified", "created")  # in fsspec's records
_PASSING = (408, 425, 429)  # of 4xx
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_CREDENTIALS = re.compile("Credential|Token.*Error|ProfileNotFound|Unauthorized|RefreshError")  # errors by class
_FETCHED: dict[str, Path] = {}  # small files of this process, by address


class NotThere(InputError):
    """The store says that it has no such file."""


def is_address(text: str) -> bool:
    """Whether a text names something else than a path of this disk."""
    return "://" in text or text.startswith(_PIPE)


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
        """A folder in this one."""
        return replace(self, given=f"{self.given}/{name}", base=f"{self.base}/{name}")

    def file(self, name: str) -> Path:
        """A small file, such as the manifest, as it is now; fetched once by a process."""
        if self.local is not None:
            return self.local / name
        url = self.url(name)
        if url not in _FETCHED:
            mark = None if url.startswith(_PIPE) else tried(url, self.option, lambda: _stamp_at(url))
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
        if self.base.startswith((_PIPE, "http://", "https://")):
            return None

        def listed() -> dict[str, int]:
            system, path = file_system(self.base)
            system.invalidate_cache()
            return {Path(entry["name"]).name: entry["size"] for entry in system.ls(path, detail=True)}

        return tried(self.base, self.option, listed)

    def opened(self, name: str, size: int, sha256: str) -> AbstractContextManager[IO[bytes]]:
        """A shard, open for reading; it is not removed from the cache meanwhile."""
        return self.cache.opened(sha256, size, lambda path: self.fetch(name, path, size, sha256))

    def fetch_ahead(self, name: str, size: int, sha256: str) -> None:
        """Bring a shard into the cache, unless another process is at it."""
        self.cache.bring(sha256, size, lambda path: self.fetch(name, path, size, sha256), wait=False)

    def fetch(self, name: str, path: Path, size: int | None = None, sha256: str | None = None) -> None:
        """Write one of its files to `path`, whole, as far as its size and checksum are known."""

        def arrived() -> None:
            download(self.url(name), path)
            _check_arrived(path, size, sha256)

        tried(self.url(name), self.option, arrived)


Folder = Path | Store


def on_disk(folder: Folder | str) -> Path | None:
    """The folder, where the shards lie on this disk."""
    return folder.local if isinstance(folder, Store) else Path(folder)


def beside(folder: Folder, name: str) -> Path:
    """The folder on this disk with a small file that lies beside the shards; of a store it is fetched first."""
    return folder.file(name).parent if isinstance(folder, Store) else folder


def manifest_of(folder: Folder | str, option: str = "data") -> Manifest:
    """The manifest of a folder or a store, of a pattern with its shards alone."""
    if not isinstance(folder, Store):
        return read_manifest(folder, option)
    try:
        return folder.subset(read_manifest(beside(folder, MANIFEST), option))
    except NotThere:
        written = "the folder of the shards" if "\0" in folder.base else folder.base
        raise InputError(
            f"{option}={folder} has no {MANIFEST} beside its shards; write it with `ldmlab index {written}`."
        ) from None


def has_manifest(folder: Folder) -> bool:
    """Whether there are shards with a manifest."""
    try:
        return (beside(folder, MANIFEST) / MANIFEST).exists()
    except NotThere:
        return False


def check_there(folder: Folder | str, manifest: Manifest, sha256: bool = False) -> None:
    """`check_shards`; of a store the sizes, where it lists them: sums are checked as the shards arrive."""
    if (local := on_disk(folder)) is not None or not isinstance(folder, Store):
        check_shards(local or Path(), manifest, sha256)
        return
    if (sizes := folder.sizes()) is None:
        return
    for shard in manifest.shards:
        if (size := sizes.get(shard.name)) != shard.bytes:
            found = "is missing" if size is None else f"has {size} bytes, not the {shard.bytes} of its manifest"
            raise InputError(f"shard {folder.url(shard.name)} {found}; copy or pack it again.")


def shards_at(text: str, option: str, cache: ShardCache) -> Path | Store:
    """What an option that takes shards names: a folder of this disk, or a store."""
    if text.startswith(_PIPE):
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


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        waits = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": waits}
    return fsspec.core.url_to_fs(url, **options)


def download(url: str, path: Path) -> None:
    """The bytes behind an address, or those that a command writes, into `path`."""
    if not url.startswith(_PIPE):
        system, place = file_system(url)
        system.get_file(place, str(path))
        return
    from webdataset.gopen import gopen

    stream: Any = gopen(url, "rb")
    with stream, open(path, "wb") as file:
        while data := stream.read(1 << 20):
            file.write(data)


def upload(path: Path, url: str, option: str) -> str | None:
    """Write a file to an address, whole; its stamp there."""

    def put() -> str | None:
        system, place = file_system(url)
        if url.partition("://")[0] not in _BUCKETS:
            system.makedirs(place.rpartition("/")[0], exist_ok=True)
        system.put_file(str(path), place)
        system.invalidate_cache()
        if (size := system.info(place)["size"]) != path.stat().st_size:
            raise _NotWhole(f"{size} bytes lie there of {path.stat().st_size} that were sent")
        return stamp(system.info(place))

    return tried(url, option, put)


def files_at(address: str, option: str) -> dict[str, str | None]:
    """Stamps of all files under an address, by their names in it."""

    def find() -> dict[str, str | None]:
        system, place = file_system(address)
        system.invalidate_cache()
        return {name[len(place) :].lstrip("/"): stamp(info) for name, info in system.find(place, detail=True).items()}

    try:
        return tried(address, option, find)
    except NotThere:
        return {}


def stamp(info: Mapping[str, Any]) -> str | None:
    """What changes with a file's content, as far as its store tells."""
    return next((f"{info['size']} {info[name]}" for name in _IDENTITIES if info.get(name)), None)


def _stamp_at(url: str) -> str | None:
    system, place = file_system(url)
    system.invalidate_cache()
    return stamp(system.info(place))


def key_of(address: str) -> str:
    """A name for an address in a folder."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]


class _NotWhole(OSError):
    """A file is not what it was to be."""


def _check_arrived(path: Path, size: int | None, sha256: str | None) -> None:
    if size is not None and (found := path.stat().st_size) != size:
        raise _NotWhole(f"{found} bytes arrived of the {size} that are recorded")
    if sha256 is not None and file_sha256(path) != sha256:
        raise _NotWhole("what arrived has another checksum than its manifest records")


def tried(url: str, option: str, action: Callable[[], T]) -> T:
    """The outcome of `action`, tried again where its fault may pass; its faults are sentences."""
    for number in count(1):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:
            _raise_lasting(error, url, option)
            if number == TRIES:
                raise InputError(
                    f"{option}: {url} failed {TRIES} times ({_cause(error)}); check the network and what "
                    "lies there, and run the same command again to continue."
                ) from None
        time.sleep(FIRST_WAIT_SECONDS * 2 ** (number - 1))
    raise AssertionError


def _raise_lasting(error: Exception, url: str, option: str) -> None:
    """The sentence of a fault that another try would meet again."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    number = int(str(status)) if str(status).isdecimal() else 0
    protocol = url.partition("://")[0]
    if isinstance(error, OSError) and error.errno in FULL:
        raise InputError(f"{option}: no space left for {url}; free some disk space and run the command again.")
    if isinstance(error, FileNotFoundError) or number in (404, 410):
        raise NotThere(f"{option}: {url} does not exist; check the address, or write there with `ldmlab pack`.")
    if isinstance(error, PermissionError) or number in (401, 403) or _CREDENTIALS.search(type(error).__name__):
        raise InputError(
            f"{option}: access to {url} is refused ({_cause(error)}); check the credentials in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS) and their "
            "rights."
        )
    if isinstance(error, ImportError):
        package = _PACKAGES.get(protocol, "the package it names")
        raise InputError(f"{option}={url} needs {package} ({_cause(error)}); run `pip install {package}`.")
    lasting = 400 <= number < 500 and number not in _PASSING
    if lasting or isinstance(error, ValueError | TypeError | NotImplementedError):
        raise InputError(f"{option}={url} cannot be used ({_cause(error)}); check the address.")


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())[:200].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
