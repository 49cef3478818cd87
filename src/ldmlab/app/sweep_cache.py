"""Parts that several jobs share: named by the content that made them, made once, by one job at a time."""

import fcntl
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from ldmlab import distributed
from ldmlab.data.shard_data import ShardData

_WAIT_SECONDS = 5.0
# How the images are read, not which; where the run is watched, not what it learns.
_NOT_OF_DATA = {
    "train",
    "val",
    "latents",
    "states",
    "workers",
    "cache",
    "cache_limit_gib",
    "sha256",
    "object_background",
}
_NOT_OF_TRAINER = ("log_every", "validate_every", "checkpoint_every", "keep", "accelerator", "devices", "compile")


def content_key(*parts: Any) -> str:
    """Ten hexadecimal digits that change when any of the parts does."""
    text = json.dumps(parts, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def data_content(node: Mapping[str, Any], data: ShardData) -> dict[str, Any]:
    """The images by the hash of their manifest, wherever they lie, and how they are drawn."""
    drawn = {name: value for name, value in node.items() if name not in _NOT_OF_DATA}
    return drawn | {"images": data.manifest("train", "images").hash}


def trainer_content(node: Mapping[str, Any]) -> dict[str, Any]:
    """What of the trainer decides the weights."""
    return {name: value for name, value in node.items() if name not in _NOT_OF_TRAINER}


def once(folder: Path, mark: str, make: Callable[[], None]) -> bool:
    """Make `folder` unless its `mark` is there; True when it was made. Another job making it is waited for."""
    with _alone(folder):
        if distributed.shared((folder / mark).exists):
            return False
        make()
        distributed.barrier()
        return True


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One job at a time; its processes are one job, of which the first holds the lock."""
    held: list[IO[str]] = []

    def take() -> bool:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.parent / f".{folder.name}.lock", "a+")  # noqa: SIM115 - held until the end
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return False
        held.append(file)
        return True

    told = False
    while not distributed.shared(take):
        if not told and distributed.rank() == 0:
            print(f"another job is making {folder}; waiting for it.", file=sys.stderr, flush=True)
        told = True
        time.sleep(_WAIT_SECONDS)
    try:
        yield
    finally:
        for file in held:
            file.close()
