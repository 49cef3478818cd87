"""The folder a command writes shards to, or the address it sends them to, and a shard being written.

A folder is never mixed with something else, and continued only with the same options. What goes to an address is
written to a folder of this machine first and sent when it is complete, manifests last.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c

from ldmlab.data.manifest import MANIFEST, PLAN
from ldmlab.data.shard_cache import shards_folder
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.tars import END_MARKER
from ldmlab.data.transfers import files_at, is_address, key_of, upload
from ldmlab.disks import disk_errors, locked
from ldmlab.errors import InputError
from ldmlab.files import file_sha256, read_json, write_json

T = TypeVar("T")
BAD = "bad.json"  # next to a manifest: samples or images that cannot be used, with the reasons
_LOCK = ".lock"
_LAST = (MANIFEST, "model.yaml")  # without them the other files are unfinished
_NOTED_SECONDS = 5.0  # between notes of what was sent
_SHOWN = 3  # changed options named
_WELCOME = (_LOCK, f"{_LOCK}.held", "README.md", "LICENSE")  # allowed next to the splits


@contextmanager
def folder_in_use(out: Path) -> Iterator[None]:
    """Makes the folder and holds its lock; InputError where it holds something else than shards."""
    if out.exists() and not out.is_dir():
        raise InputError(f"OUT={out} is a file; give a folder.")
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        ours = path.is_dir() and ((path / PLAN).exists() or (path / MANIFEST).exists() or not any(path.iterdir()))
        if path.name not in _WELCOME and not ours:
            raise InputError(f"OUT={out} holds something else ({path.name}); choose a new folder.")
    new = not out.exists()
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        try:
            with locked(out / _LOCK, f"OUT={out} is in use by another process", remove=True):
                yield
        finally:
            if new:
                with suppress(OSError):
                    out.rmdir()  # nothing was written


@dataclass(frozen=True)
class Destination:
    """Where a command writes: a folder, or one of this machine whose files go to an address."""

    given: str  # as typed
    folder: Path
    address: str | None = None

    @classmethod
    def of(cls, given: str, option: str = "OUT", shared: bool = False) -> "Destination":
        """InputError where nothing can be written, or where something lies that was not sent from here; `shared`: the
        files join others that lie there."""
        if not is_address(given):
            return cls(given, Path(given))
        if given.startswith(("pipe:", "http://", "https://")) or "::" in given or "{" in given:
            raise InputError(
                f"{option}={given}: nothing can be written there; give a folder, or an address like s3://BUCKET/FOLDER."
            )
        address = given.rstrip("/")
        where = cls(given, shards_folder() / "outgoing" / f"{'shared-' if shared else ''}{key_of(address)}", address)
        sent = where._sent()
        for name, there in files_at(address, option).items():
            if not shared and sent.get(name, ["", ""])[1] not in (there, None):
                raise InputError(f"{option}={given} holds something else ({name}); choose a new address.")
        return where

    def named(self, name: str) -> str:
        """How messages call one of its folders."""
        return f"{self.given.rstrip('/')}/{name}"

    def _sent(self) -> dict[str, list[str | None]]:
        """SHA-256 of files that were sent, or are about to be, and their stamps there."""
        sent = read_json(self._note)
        return sent if isinstance(sent, dict) else {}

    @property
    def _note(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.sent.json")

    def send(self, progress: Callable[[int, int], None] | None = None, option: str = "OUT") -> None:
        """Send what lies in the folder but is not at the address as it was sent; a folder stays as it is."""
        if self.address is None:
            return
        with locked(self._note.with_suffix(".lock"), f"{option}={self.given} is being sent", wait=True, quiet=True):
            files = (path.relative_to(self.folder) for path in self.folder.rglob("*") if path.is_file())
            names = [str(f) for f in files if f.suffix != ".tmp" and not any(part.startswith(".") for part in f.parts)]
            names.sort(key=lambda name: (Path(name).name in _LAST, name))
            sums, before = {name: file_sha256(self.folder / name) for name in names}, self._sent()
            there = files_at(self.address, option)
            sent = {name: [sums[name], None] for name in names}
            sent |= {n: e for n, e in before.items() if n in sums and n in there and e == [sums[n], there[n]]}
            todo, noted = [name for name in names if sent[name][1] is None], 0.0
            for number, name in enumerate(todo):
                if time.monotonic() > noted + _NOTED_SECONDS:
                    write_json(self._note, sent)
                    noted = time.monotonic()
                sent[name][1] = upload(self.folder / name, f"{self.address}/{name}", option)
                if progress:
                    progress(number + 1, len(todo))
            write_json(self._note, sent)


def open_plan(path: Path, plan: dict[str, Any], named: str, special: Mapping[str, str] | None = None) -> None:
    """Store what a folder is begun with, or compare it with what is there; the caller holds its lock.

    named: its name in messages; special: keys of `plan` whose values are hashes => what differs, in words.
    """
    plan = json.loads(json.dumps(plan))  # tuples as lists, as they come back from the file
    if not path.exists():
        write_json(path, plan)
        return
    before = read_json(path)
    if not isinstance(before, dict):
        raise InputError(f"{named} cannot be continued because its {path.name} is damaged; choose a new folder.")
    if before == plan:
        return
    for key, words in (special or {}).items():
        if before.get(key) != plan[key]:
            raise InputError(f"{named} was begun with {words}; use the same again or choose a new folder.")
    flat, new = _flat(before), _flat(plan)
    names = [name for name in {**flat, **new} if flat.get(name) != new.get(name)]
    changes = [f"{name}={flat.get(name)} (now {new.get(name)})" for name in names[:_SHOWN]]
    changes += [f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    changes = changes or ["options of another version of ldmlab"]
    raise InputError(f"{named} was begun with {', '.join(changes)}; use the same again or choose a new folder.")


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `split.val` => value."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def finished_shard(side_file: Path, shard: Path, take: Callable[[dict[str, Any]], T]) -> T | None:
    """`take` of what the side file of a complete shard records, `info` as a ShardInfo or None; None: still to do."""
    side = read_json(side_file)
    try:
        info = side["info"] = ShardInfo.from_plain(side["info"]) if side["info"] else None
        taken = take(side)
    except (KeyError, TypeError, ValueError):
        return None
    if info is not None and not (shard.is_file() and shard.stat().st_size == info.bytes):
        return None
    return taken


class ShardFile:
    """A shard being written, under a temporary name until it is complete; either `finish` or `abandon` closes it."""

    def __init__(self, path: Path, writer: str = "") -> None:
        self._path, self._temporary = path, path.with_name(f"{path.name}.{writer or os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed by `finish` or `abandon`
        self._digest, self._bytes = hashlib.sha256(), 0
        self._offsets, self._sums = list[int](), list[int]()

    def append(self, samples: bytes, offsets: Sequence[int] = (0,)) -> None:
        """Tar members of complete samples, and where in them each sample begins."""
        self._offsets += [self._bytes + offset for offset in offsets]
        for start, end in pairwise([*offsets, len(samples)]):
            self._sums.append(google_crc32c.value(samples[start:end]))
        self._write(samples)

    def finish(self) -> ShardInfo | None:
        """The shard under its own name; None, and no file, if it has no sample."""
        if not self._offsets:
            self.abandon()
            return None
        self._write(END_MARKER)
        self._sums[-1] = google_crc32c.extend(self._sums[-1], END_MARKER)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        return ShardInfo.of(self._path.name, self._bytes, self._digest.hexdigest(), self._offsets, self._sums)

    def abandon(self) -> None:
        """Leave nothing of an unfinished shard."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._bytes += len(data)
