"""Shards of a store kept on a disk of this machine, shared by all its processes and runs.

A shard lies under its SHA-256, so one that several folders or runs read is there once; whoever fetches it checks the
sum before the name appears. The folder stays below its limit: the shards read longest ago go first, one that is being
read or fetched never. All locks are BSD locks, which end with their process.
"""

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ldmlab.disks import disk_errors
from ldmlab.errors import InputError
from ldmlab.files import read_json, sync_folder, weights_folder, write_atomically, write_json

_ROOM_SECONDS = 60.0  # to wait for others to let go of shards
_PAUSE_SECONDS = 0.1
_GIB = 2**30
Fetch = Callable[[Path], None]  # writes the file, or raises


def shards_folder() -> Path:
    """LDMLAB_SHARDS, or `shards` in the folder of fetched files."""
    return Path(os.environ.get("LDMLAB_SHARDS") or weights_folder() / "shards")


@dataclass(frozen=True)
class ShardCache:
    """A folder, and how much may lie in it."""

    folder: Path
    gib: float

    @contextmanager
    def opened(self, sha256: str, size: int, fetch: Fetch) -> Iterator[IO[bytes]]:
        """The shard, fetched first where it is missing; inside, no process removes it."""
        while True:
            file = self._take(sha256, size)
            if file is not None:
                with file:
                    yield file
                return
            self.bring(sha256, size, fetch)

    def _take(self, sha256: str, size: int) -> IO[bytes] | None:
        """The shard's file under a shared lock; None where it is not there."""
        path = self._path(sha256)
        try:
            file = open(path, "rb", buffering=0)  # noqa: SIM115  closed by the caller
        except FileNotFoundError:
            return None
        self._lock(file, fcntl.LOCK_SH)
        found = os.fstat(file.fileno())
        if found.st_nlink == 0 or found.st_size != size:  # removed a moment ago, or damaged
            file.close()
            if found.st_nlink:
                path.unlink(missing_ok=True)
            return None
        with suppress(OSError):
            os.utime(path)  # read now
        return file

    def bring(self, sha256: str, size: int, fetch: Fetch, wait: bool = True) -> None:
        """Fetch a shard unless it is there; without `wait` also unless somebody else is at it."""
        if size > self.gib * _GIB:
            raise InputError(
                f"data.shard_cache_gib={self.gib:g} is less than a shard ({size / _GIB:.2f} GiB); raise it."
            )
        path, part = self._path(sha256), self.folder / f"{sha256}.{size}.part"
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(_slot(sha256), wait) as taken:
            if not taken or path.exists() or not self._reserved(part, size, wait):
                return
            try:
                fetch(part)
                with open(part, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
                sync_folder(self.folder)
            finally:
                part.unlink(missing_ok=True)

    def file(self, folder: str, name: str, stamp: str | None, fetch: Fetch) -> Path:
        """A file beside shards, fetched where `stamp` has changed or is None; whoever reads an older one keeps it."""
        path = self.folder / "files" / folder / name
        mark = path.with_name(f"{name}.stamp")
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(f"file-{folder[:2]}", True):
            if stamp is None or not path.exists() or read_json(mark) != stamp:
                mark.unlink(missing_ok=True)
                write_atomically(path, fetch)
                write_json(mark, stamp)
        return path

    def _reserved(self, part: Path, size: int, wait: bool) -> bool:
        """Make room for a shard and announce it by an empty file, whose name tells its size."""
        end = time.monotonic() + _ROOM_SECONDS
        while True:
            with self._locked("room", True):
                if self._make_room(part, size):
                    part.touch()
                    return True
            if not wait:
                return False
            if time.monotonic() > end:
                raise InputError(
                    f"data.shard_cache_gib={self.gib:g} is too little for the shards that are fetched at one time; "
                    "raise it, or use fewer data.workers."
                )
            time.sleep(_PAUSE_SECONDS)

    def _make_room(self, part: Path, size: int) -> bool:
        """Remove shards until `size` more bytes fit; the caller holds the lock of the room."""
        whole, used = list[tuple[float, int, Path]](), 0
        for path in self.folder.iterdir():
            with suppress(FileNotFoundError):
                if path.suffix == ".tar":
                    found = path.stat()
                    whole.append((found.st_mtime, found.st_size, path))
                    used += found.st_size
                elif path.suffix == ".part" and path != part:
                    used += self._under_way(path, _slot(part.name))
        for _, bytes_, path in sorted(whole):
            if used + size <= self.gib * _GIB:
                break
            with suppress(OSError), open(path, "r+b") as file:  # written by nobody: some systems want it for this lock
                if self._lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    path.unlink()
                    used -= bytes_
        return used + size <= self.gib * _GIB

    def _under_way(self, part: Path, own: str) -> int:
        """Bytes that another process is fetching; what a process left that ended is removed."""
        if (slot := _slot(part.name)) != own:
            with self._locked(slot, False) as taken:
                if not taken:
                    return int(part.name.split(".")[1])
        part.unlink(missing_ok=True)
        return 0

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    @contextmanager
    def _locked(self, name: str, wait: bool) -> Iterator[bool]:
        """Whether the lock is held inside."""
        with disk_errors(self.folder):
            file = open(self.folder / f"{name}.lock", "ab")  # noqa: SIM115
        with file:
            yield self._lock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def _lock(self, file: IO[bytes], how: int) -> bool:
        try:
            fcntl.flock(file, how)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            raise InputError(
                f"data.shard_cache={self.folder} lies on a file system without locks ({error.strerror}); choose a "
                "folder on a disk of this machine."
            ) from None


def _slot(sha256: str) -> str:
    """Name of the lock under which a shard is fetched; a few share one, so that their number is fixed."""
    return f"fetch-{sha256[:2]}"


class Ahead:
    """A thread that brings the shards of the next reads; for loader processes, which never fork."""

    def __init__(self, bring: Callable[[int], object], first: int) -> None:
        self._bring, self._first = bring, first  # first: where in each list to begin, another one in every process
        self._wanted: Sequence[int] = ()
        self._changed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def want(self, shards: Sequence[int]) -> None:
        """The shards to bring now, instead of those before."""
        if shards != self._wanted:
            self._wanted = shards
            self._changed.set()

    def _run(self) -> None:
        while self._changed.wait():
            self._changed.clear()
            wanted = self._wanted
            for number in range(len(wanted)):
                if self._changed.is_set():
                    break
                with suppress(Exception):  # whoever reads that shard meets the fault, whose sentence ends the run
                    self._bring(wanted[(number + self._first) % len(wanted)])
