"""What the processes of one run tell each other; everything is a no-op for a single process."""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_RANK_NAMES = ("RANK", "SLURM_PROCID")
_WORLD_NAMES = ("WORLD_SIZE", "SLURM_NTASKS")
_BUCKET_ELEMENTS = 6_500_000  # 25 MB of float32 a bucket


def joined() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process: of the group, or what torchrun or srun said before there is one."""
    return dist.get_rank() if joined() else _from_environment(_RANK_NAMES, 0)


def world_size() -> int:
    """Number of processes: of the group, or what torchrun or srun said before there is one."""
    return dist.get_world_size() if joined() else _from_environment(_WORLD_NAMES, 1)


def _from_environment(names: tuple[str, ...], default: int) -> int:
    """Torchrun's variables; srun's only where a rendezvous address says that the tasks belong together."""
    if "RANK" in os.environ:
        names = names[:1]
    elif "MASTER_ADDR" not in os.environ:
        return default
    return next((int(os.environ[name]) for name in names if name in os.environ), default)


def join() -> None:
    """Start the process group that torchrun or srun has prepared; nccl with a GPU, gloo without."""
    if joined() or world_size() == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank(), world_size=world_size())


def sum_(tensor: Tensor) -> Tensor:
    """Sum over processes, in place."""
    if joined():
        dist.all_reduce(tensor)
    return tensor


def mean_(tensor: Tensor) -> Tensor:
    """Mean over processes, in place."""
    return sum_(tensor).div_(world_size()) if joined() else tensor


def largest_(tensor: Tensor) -> Tensor:
    """Maximum over processes, in place."""
    if joined():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather(value: Any) -> list[Any]:
    """One picklable value of every process, in the order of ranks, on every process."""
    if not joined():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value that the first process holds."""
    if not joined():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def barrier() -> None:
    """Wait for all processes."""
    if joined():
        dist.barrier()


@torch.no_grad()
def mean_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes, in flat buckets of at most 25 MB."""
    if not joined():
        return
    for parameter in parameters:  # a process whose micro-batches did not reach a parameter must still take part
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        bucket.append(gradient)
        if sum(g.numel() for g in bucket) >= _BUCKET_ELEMENTS:
            _mean_bucket(bucket)
            bucket = []
    if bucket:
        _mean_bucket(bucket)


def _mean_bucket(gradients: list[Tensor]) -> None:
    flat = mean_(torch.cat([g.reshape(-1) for g in gradients]))
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
