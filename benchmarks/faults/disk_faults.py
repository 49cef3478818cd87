"""Full and read-only disks, and places where nothing can be made.

Real disks are small tmpfs mounted in a mount namespace of the fault's own process, which ends with it.
"""

import ctypes
import os
from pathlib import Path

from faults.base import COMMANDS, digest
from faults.cases import GOOD, Case, last_lines
from faults.commands import Result

NEEDS = {
    "pack": ["images"],
    "first_stage": ["packed"],
    "encode": ["packed", "first_stage"],
    "denoiser": ["packed", "latents"],
    "export": ["denoiser"],
    "sample": ["model"],
    "evaluate": ["packed", "first_stage", "clip"],
}


def full_disk(case: Case) -> None:
    """No file may be larger than a limit; with room again, the same command ends as if nothing had been."""
    name = case.rng.choice([name for name in NEEDS if name != "evaluate"])
    case.copy(*NEEDS[name])
    size = int(2 ** case.rng.uniform(12, 22))  # what is printed goes to files too
    case.outcome.planted = f"{name} with files of at most {size} bytes"
    result = case.run(COMMANDS[name], file_bytes=size)
    _and_again(case, name, result, COMMANDS[name])


def _and_again(case: Case, name: str, result: Result, argv: list[str]) -> None:
    """After a refusal for want of room: with room, the same command gives the same."""
    if case.outcome.how not in GOOD:
        return
    if result.code == 0:
        case.classify(result, name)
        return
    case.classify(result, name)
    again = case.run(argv)
    if again.code != 0:
        case.set("silent", f"cannot be run again: {again.sentence or last_lines(again)}")
    elif digest(name, case.work) != case.base.digests[name]:
        case.set("silent", "run again, it ends with another result")


def real_disk(case: Case) -> None:
    """A file system without bytes, without inodes, without the right to write, or without shared memory."""
    name, how = case.rng.choice(sorted(NEEDS)), case.rng.choice(("bytes", "bytes", "bytes", "inodes", "read-only"))
    if name in ("first_stage", "denoiser") and case.rng.random() < 0.3:
        how = "shared memory"
    _own_mounts()
    argv, room = COMMANDS[name], "size=512m,nr_inodes=100000"  # a tmpfs made without a limit takes none later
    place = Path("/dev/shm") if how == "shared memory" else case.work
    _mount(place, room)
    case.copy(*NEEDS[name])
    used = sum((path.stat().st_size + 4095) // 4096 * 4096 for path in case.work.rglob("*") if path.is_file())
    entries = sum(1 for _ in case.work.rglob("*")) + 1
    spare = int(2 ** case.rng.uniform(12, 22))
    few = case.rng.randrange(1, 12)
    limits = {"bytes": f"size={used + spare},nr_inodes=100000", "inodes": f"size=512m,nr_inodes={entries + few}"}
    limits |= {"read-only": room, "shared memory": f"size={spare >> 4}"}
    _mount(place, limits[how], _REMOUNT | _READ_ONLY * (how == "read-only"))
    more = {"bytes": f"{spare} bytes are free", "inodes": f"{few} files more", "shared memory": f"{spare >> 4} bytes"}
    case.outcome.planted = f"{name}, {how}: {more.get(how, '')}"
    argv = [word.replace("data.workers=0", "data.workers=2") if how == "shared memory" else word for word in argv]
    try:
        result = case.run(argv)
        _mount(place, room, _REMOUNT)
        _and_again(case, name, result, argv)
    finally:
        _LIBC.umount2(os.fsencode(place), _DETACH)


_LIBC = ctypes.CDLL(None, use_errno=True)
_NEW_NAMESPACE, _READ_ONLY, _REMOUNT, _DETACH, _PRIVATE = 0x20000, 1, 32, 2, 16384 | 262144  # of Linux's headers


def _own_mounts() -> None:
    """Leave the mounts that other processes see."""
    if _LIBC.unshare(_NEW_NAMESPACE) or _LIBC.mount(b"none", b"/", None, _PRIVATE, None):
        raise OSError(ctypes.get_errno(), "a mount namespace of one's own")


def _mount(place: Path, options: str, flags: int = 0) -> None:
    if _LIBC.mount(b"tmpfs", os.fsencode(place), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mounting a tmpfs with {options}", str(place))


def can_mount() -> bool:
    """Whether this machine lets us mount, tried in another process."""
    pid = os.fork()
    if pid == 0:
        try:
            _own_mounts()
            _mount(Path("/tmp"), "size=64k")
        except OSError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def read_only(case: Case) -> None:
    """A place where nothing can be made: a file in the way, a path too long, a device."""
    name = case.rng.choice(("pack", "encode", "export", "first_stage"))
    case.copy("images", "packed", "first_stage", "denoiser")
    (case.work / "a file").write_text("x")
    target = case.rng.choice(("a file/out", "a file", "x" * 300, "/proc/out", "/dev/null", "/dev/full/out"))
    option = {"first_stage": "run.dir", "encode": "out"}.get(name)
    argv = list(COMMANDS[name])
    if option:
        argv = [word for word in argv if not word.startswith(f"{option}=")] + [f"{option}='{target}'"]
    else:
        argv[2] = target
    case.outcome.planted = f"{name} to {target[:20]!r}"
    case.classify(case.run(argv), name, same=lambda: False)


KINDS = {"disk full": full_disk, "disk: no place": read_only}
MOUNTED = {"disk: file systems": real_disk}  # where mounting is allowed
