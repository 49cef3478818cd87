"""Disks: their faults as sentences, and locks that work on every file system, held by one process at a time."""

import errno
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import IO, Any

from ldmlab.errors import InputError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_HELD: set[str] = set()  # paths of the locks that this process holds: POSIX locks do not exclude their own process
_ONE_THREAD = threading.RLock()  # takes or releases a lock at a time
os.register_at_fork(before=_ONE_THREAD.acquire, after_in_parent=_ONE_THREAD.release, after_in_child=_ONE_THREAD.release)
_WAIT_SECONDS = 0.2
_TAKEOVER_SECONDS = 60.0  # after that the removal of a dead process's lock was itself interrupted


def open_regular(path: Path) -> FileIO:
    """A file opened for reading, unbuffered; OSError for pipes, devices, sockets and folders, which could block."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(handle, "rb", buffering=0)


@contextmanager
def disk_errors(path: Path | str) -> Iterator[None]:
    """Inside, a full or read-only disk and missing permissions become an InputError about `path`."""
    try:
        yield
    except OSError as error:
        if (sentence := disk_sentence(error, path)) is None:
            raise
        raise InputError(sentence) from error


def disk_sentence(error: OSError, path: Path | str) -> str | None:
    """What went wrong with the disk and what helps; None for any other fault."""
    if error.errno in FULL:
        return f"no space left for {path}; free some disk space and run the command again."
    if error.errno == errno.EROFS:
        return f"{path} cannot be written because its disk is read-only; choose a folder on another disk."
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return f"{path} cannot be written because a folder and a file of this path have one name; choose another path."
    place, target = Path(error.filename or ""), Path(path)
    beside = place.parent == Path(os.path.abspath(target)).parent  # a temporary file
    ours = beside or place in (target, *target.parents)
    if error.errno == errno.ENOENT and ours and place.parent.is_dir():  # /proc
        made = place if place in (target, *target.parents) else target
        return f"{made} cannot be made because {made.parent} takes no new files; choose another folder."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{path} cannot be written (permission denied); allow it or choose another folder."
    return None


# ---- locks


@contextmanager
def locked(path: Path, busy: str, *, wait: bool = False, quiet: bool = False, remove: bool = False) -> Iterator[None]:
    """Hold the lock file `path`; while another process has it, wait or refuse with "BUSY (process 7 on HOST); ...".

    quiet: wait without a message; remove: delete the lock file at the end.
    """
    lock = FileLock(path)
    while not lock.take():
        if not wait:
            raise InputError(f"{busy} ({lock.holder()}); wait for it or choose another folder.")
        if not quiet:
            print(f"{busy} ({lock.holder()}); waiting for it.", file=sys.stderr, flush=True)
        quiet = True
        time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        lock.release(remove=remove)


@contextmanager
def own_folder(find: Callable[[], Path], lock: str, busy: str) -> Iterator[Path]:
    """The folder that `find` checks or makes, for this command alone: another one is refused as `locked` does.

    The first process finds it; the others follow. `lock`: name of the lock file inside; `busy`: words of `locked`, {}
    for the folder. An empty folder is removed at the end.
    """
    from ldmlab import distributed  # imports torch

    with ExitStack() as held:

        def take() -> Path:
            folder = find()
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder / lock, busy.format(folder), remove=True))
            return folder

        folder = distributed.shared(take)
        try:
            yield folder
        finally:
            held.close()
            if distributed.rank() == 0:
                with suppress(OSError):
                    folder.rmdir()  # nothing was written


class FileLock:
    """A lock file that one process holds until `release` or its end, also after a kill.

    A POSIX record lock (forked loader workers do not inherit it). Where the file system has none, a file made
    exclusively, `PATH.held`, with host and process id; one whose process is dead is taken over.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._held_path = path, path.with_name(path.name + ".held")
        self._file: IO[str] | None = None
        self._exclusive = False

    def take(self) -> bool:
        """Whether this process holds the lock now, and no other thread of it has it."""
        with _ONE_THREAD:
            return self._take()

    def _take(self) -> bool:
        name = os.path.realpath(self.path)
        if name in _HELD:
            return False
        with disk_errors(self.path):
            file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115  held until `release`
        try:  # where its last holder removed it, this is another file than the one at `path`
            taken = self._lock(file) and os.fstat(file.fileno()).st_ino == os.stat(self.path).st_ino
        except FileNotFoundError:
            taken = False
        if not taken:
            file.close()
            return False
        self._file = file
        _HELD.add(name)
        with suppress(OSError):
            file.truncate(0)
            file.write(_signature())
            file.flush()
        return True

    def _lock(self, file: IO[str]) -> bool:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                self._exclusive = self._make_held()
            elif error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            return self._exclusive

    def _make_held(self) -> bool:
        """Create `PATH.held`, after removing the one of a dead process."""
        try:
            with open(self._held_path, "x", encoding="utf-8") as held:
                held.write(_signature())
            return True
        except FileExistsError:
            return self._remove_dead() and self._make_held()

    def _remove_dead(self) -> bool:
        """Remove `PATH.held` if its process has ended; one process at a time decides that."""
        guard = self._held_path.with_suffix(".takeover")
        try:
            guard.mkdir()
        except FileExistsError:
            with suppress(OSError):
                if time.time() - guard.stat().st_mtime > _TAKEOVER_SECONDS:
                    guard.rmdir()
            return False
        try:
            dead = not _alive(self._held_path)
            if dead:
                self._held_path.unlink(missing_ok=True)
            return dead
        finally:
            guard.rmdir()

    def holder(self) -> str:
        """Who holds the lock, as far as its file names it."""
        with _ONE_THREAD:
            if os.path.realpath(self.path) in _HELD:  # reading the file would release a POSIX lock of this process
                return "this process"
            found = _read_signature(self._held_path) or _read_signature(self.path)
        return f"process {found['pid']} on {found['host']}" if found else "its process is unknown"

    def release(self, *, remove: bool = False) -> None:
        """Let others have it; safe to call twice."""
        with _ONE_THREAD:
            if self._file is None:
                return
            with suppress(OSError):
                if remove:
                    self.path.unlink(missing_ok=True)
                else:
                    self._file.truncate(0)
            if self._exclusive:
                self._held_path.unlink(missing_ok=True)
            self._file.close()
            self._file, self._exclusive = None, False
            _HELD.discard(os.path.realpath(self.path))


def _signature() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())})


def _read_signature(path: Path) -> dict[str, Any] | None:
    try:
        with open_regular(path) as file:
            found = json.loads(file.read())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and {"host", "pid"} <= found.keys() else None


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, because process ids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _alive(held: Path) -> bool:
    """Whether the process of a lock may still run; one on another machine counts as running."""
    signature = _read_signature(held)
    try:
        if signature is None:  # being written at this moment, or left so by a crash
            return time.time() - held.stat().st_mtime < _TAKEOVER_SECONDS
        if signature["host"] != socket.gethostname():
            return True
        os.kill(int(signature["pid"]), 0)
    except (ProcessLookupError, FileNotFoundError):
        return False
    except (OSError, TypeError, ValueError, OverflowError):
        return True
    return signature.get("started") in (None, _started(int(signature["pid"])))
