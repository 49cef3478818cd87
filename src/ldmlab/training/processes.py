"""What the processes of one run tell each other; everything is a no-op for a single process."""

import atexit
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric.plugins.environments import SLURMEnvironment
from pytorch_lightning.plugins.environments import ClusterEnvironment
from torch import Tensor

from ldmlab.errors import InputError

T = TypeVar("T")
_BUCKET_ELEMENTS = 6_500_000  # 25 MB of float32 a bucket


def joined() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process: of the group, or what torchrun or srun said before there is one."""
    return dist.get_rank() if joined() else _told("RANK", "SLURM_PROCID", 0)


def world_size() -> int:
    """Number of processes: of the group, or what torchrun or srun said before there is one."""
    return dist.get_world_size() if joined() else _told("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def local_rank() -> int:
    """Rank of this process on its machine, which is the number of its GPU."""
    return _told("LOCAL_RANK", "SLURM_LOCALID", 0)


def local_world_size() -> int:
    """Number of processes of this run on this machine."""
    return _told("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", world_size())


def _told(torchrun_name: str, srun_name: str, default: int) -> int:
    """A number from torchrun's environment, else from srun's (only srun sets the step variables), else `default`."""
    if "RANK" in os.environ:
        return int(os.environ.get(torchrun_name, default))
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return int(os.environ.get(srun_name, default))
    return default


def join() -> None:
    """Start the process group that torchrun or srun has prepared; nccl with GPUs, gloo without."""
    if joined() or world_size() == 1:
        return
    if "MASTER_ADDR" not in os.environ:  # srun names the machines but no meeting place
        slurm = SLURMEnvironment()
        os.environ.update(MASTER_ADDR=slurm.main_address, MASTER_PORT=str(slurm.main_port))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, rank=rank(), world_size=world_size())
    atexit.register(leave)


def leave() -> None:
    """Close the process group."""
    if joined():
        dist.destroy_process_group()


class Launched(ClusterEnvironment):
    """Tells Lightning that the processes exist already and which one this is."""

    creates_processes_externally = True
    main_address = property(lambda self: os.environ.get("MASTER_ADDR", "127.0.0.1"))
    main_port = property(lambda self: int(os.environ.get("MASTER_PORT", "0")))

    @staticmethod
    def detect() -> bool:
        """Always: torchrun, srun or a single process."""
        return True

    def world_size(self) -> int:
        """Number of processes."""
        return world_size()

    def set_world_size(self, size: int) -> None:
        """Fixed at launch."""

    def global_rank(self) -> int:
        """Rank over all machines."""
        return rank()

    def set_global_rank(self, rank: int) -> None:
        """Fixed at launch."""

    def local_rank(self) -> int:
        """Rank on this machine."""
        return local_rank()

    def node_rank(self) -> int:
        """Number of this machine."""
        return rank() // max(local_world_size(), 1)


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


def shared(find: Callable[[], T]) -> T:
    """What the first process finds, on every process; an InputError of its reaches every process too."""
    found: Any = None
    refusal = ""
    if rank() == 0:
        try:
            found = find()
        except InputError as error:
            refusal = str(error)
    found, refusal = from_first((found, refusal))
    if refusal:
        raise InputError(refusal)
    return found


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
