"""Several processes on one list of images, as torchrun starts them; a single process needs no set-up."""

import datetime
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from ldmlab.errors import InputError

T = TypeVar("T")


def join() -> tuple[int, int]:
    """Rank and number of processes; the first call under torchrun opens the process group."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=datetime.timedelta(hours=2))  # only short messages pass here
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return dist.get_rank(), dist.get_world_size()


def leave() -> None:
    """Close what `join` opened."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Go on when all processes are here."""
    if dist.is_initialized():
        dist.barrier()


def from_first(find: Callable[[], T]) -> T:
    """What `find` gives on the first process, on all of them; its InputError too."""
    if not dist.is_initialized():
        return find()
    answer: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = find()
        except InputError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise InputError(str(answer[1]))
    return answer[0]  # type: ignore[return-value]
