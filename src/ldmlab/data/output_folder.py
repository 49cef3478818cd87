"""The folder a command writes shards to: used by one process at a time, and never mixed with something else."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmlab.data.manifest import MANIFEST, PLAN, write_atomically
from ldmlab.errors import InputError

_LOCK = ".lock"
_WELCOME = (_LOCK, "README.md", "LICENSE")  # may lie beside the splits


def readable_error(error: OSError) -> str:
    """The system's words, without its number."""
    return (error.strerror or str(error)).lower()


@contextmanager
def folder_in_use(out: Path) -> Iterator[None]:
    """Makes the folder and holds its lock; the system frees it even after a kill."""
    if out.exists() and not out.is_dir():
        raise InputError(f"OUT={out} is a file; give a folder.")
    if out.is_dir():
        _refuse_strangers(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock).st_ino != os.stat(out / _LOCK).st_ino:  # its last holder has just removed it
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise InputError(f"OUT={out} is in use by another process; wait for it or choose another folder.") from None
        yield
        (out / _LOCK).unlink(missing_ok=True)
    finally:
        os.close(lock)


def _refuse_strangers(out: Path) -> None:
    for path in sorted(out.iterdir()):
        ours = path.is_dir() and ((path / PLAN).exists() or (path / MANIFEST).exists() or not any(path.iterdir()))
        if path.name not in _WELCOME and not ours:
            raise InputError(f"OUT={out} holds something else ({path.name}); choose a new folder.")


def open_plan(out: Path, split: str, plan: dict[str, Any]) -> bool:
    """Stores the plan of a split or compares it with the one there; True if the split is complete."""
    folder = out / split
    folder.mkdir(exist_ok=True)
    path = folder / PLAN
    if not path.exists():
        if (folder / MANIFEST).exists():
            raise InputError(f"OUT={out} already holds a {split} split made otherwise; choose a new folder.")
        write_atomically(path, json.dumps(plan, indent=1) + "\n")
        return False
    before = json.loads(path.read_text(encoding="utf-8"))
    if before != plan:
        raise InputError(f"OUT={out} was begun {_difference(before, plan)}; use the same again or choose a new folder.")
    return (folder / MANIFEST).exists()


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What changed, in words."""
    if before["options"] == now["options"]:
        return "with other images or captions in SOURCE"
    flat, new = _flat(before["options"]), _flat(now["options"])
    changed = [f"{name}={flat.get(name)} (now {new.get(name)})" for name in new if flat.get(name) != new.get(name)]
    return "with " + ", ".join(changed)


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `split.val` => value."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
