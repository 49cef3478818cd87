"""Whole files from and to the addresses of object stores and servers, by fsspec and webdataset's pipes.

A fault that may pass (time-outs, 5xx, broken connections, cut off or altered bodies) is tried again with growing waits,
any other ends in its sentence at once.
"""

import hashlib
import re
import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from ldmlab.disks import FULL
from ldmlab.errors import InputError
from ldmlab.files import file_sha256

T = TypeVar("T")
TRIES = 6
FIRST_WAIT_SECONDS = 1.0  # doubled after every try
PIPE = "pipe:"
_CONNECT_SECONDS, _READ_SECONDS = 20, 60  # of a server that says nothing
_BUCKETS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss")  # have no folders; making one could make a bucket
_IDENTITIES = ("ETag", "etag", "md5Hash", "mtime", "last_modified", "LastModified", "created")  # in fsspec's records
_PASSING = (408, 425, 429)  # of 4xx
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
_CREDENTIALS = re.compile("Credential|Token.*Error|ProfileNotFound|Unauthorized|RefreshError")  # errors by class


class NotThere(InputError):
    """The store says that it has no such file."""


class _NotWhole(OSError):
    """A file is not what it was to be."""


def is_address(text: str) -> bool:
    """Whether a text names something else than a path of this disk."""
    return "://" in text or text.startswith(PIPE)


def key_of(address: str) -> str:
    """A name for an address in a folder."""
    return hashlib.sha256(address.encode()).hexdigest()[:16]


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        from aiohttp import ClientTimeout

        waits = ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": waits}
    return fsspec.core.url_to_fs(url, **options)


def download(url: str, path: Path, option: str, size: int | None = None, sha256: str | None = None) -> None:
    """A file into `path`, whole, as far as its size and checksum are known."""

    def arrived() -> None:
        _copy(url, path)
        if size is not None and (found := path.stat().st_size) != size:
            raise _NotWhole(f"{found} bytes arrived of the {size} that are recorded")
        if sha256 is not None and file_sha256(path) != sha256:
            raise _NotWhole("what arrived has another checksum than its manifest records")

    tried(url, option, arrived)


def _copy(url: str, path: Path) -> None:
    """The bytes behind an address, or those that a command writes."""
    if not url.startswith(PIPE):
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


def sizes_at(address: str, option: str) -> dict[str, int]:
    """Bytes of the files of a folder by name, in one listing."""

    def listed() -> dict[str, int]:
        system, place = file_system(address)
        system.invalidate_cache()
        return {Path(entry["name"]).name: entry["size"] for entry in system.ls(place, detail=True)}

    return tried(address, option, listed)


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


def stamp_at(url: str, option: str) -> str | None:
    def found() -> str | None:
        system, place = file_system(url)
        system.invalidate_cache()
        return stamp(system.info(place))

    return tried(url, option, found)


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
        raise NotThere(f"{option}: {url} does not exist; check the address and its bucket.")
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
