"""The processes of one run, as torchrun or srun starts them; collectives do nothing in a single process."""

import atexit
import datetime
import os
import platform
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ldmlab.errors import InputError, first_line

T = TypeVar("T")
_MEETING = datetime.timedelta(minutes=5)  # how long processes wait for each other at the start
_LOST = re.compile(r"(?i)connection (closed|reset|refused)|broken pipe|gloo|nccl|peer|timed? ?out")
_SHELLS = ("bash", "sh", "zsh", "fish", "interactive")  # SLURM_JOB_NAME of a shell
_chosen: dict[str, Any] = {"timeout": None}  # of collectives, a timedelta; None: torch's own


def joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process: in the group, or in the launcher's environment before there is one."""
    if joined():
        return dist.get_rank()
    number, world = _launched("RANK", "SLURM_PROCID", 0), world_size()
    if number >= world > 1:
        name, of = ("RANK", "WORLD_SIZE") if "RANK" in os.environ else ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
        raise InputError(
            f"the environment variable {name}={number} must be below {of}={world}; start with torchrun or srun."
        )
    return number


def world_size() -> int:
    """Number of processes: of the group, or in the launcher's environment before there is one."""
    return dist.get_world_size() if joined() else _launched("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", 1)


def local_rank() -> int:
    """Rank of this process on its machine, which is the number of its GPU."""
    return _launched("LOCAL_RANK", "SLURM_LOCALID", 0)


def local_world_size() -> int:
    """Number of processes of this run on this machine; srun without --ntasks-per-node writes `8(x2),4` for all."""
    counts = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    if "RANK" not in os.environ and "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_NTASKS_PER_NODE" not in os.environ:
        found = re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
        by_node = [int(count) for count, times in found for _ in range(int(times or 1))]
        if (node := int(os.environ.get("SLURM_NODEID", "0"))) < len(by_node):
            return by_node[node]
    return _launched("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", world_size())


def _launched(torchrun_name: str, srun_name: str, default: int) -> int:
    """A number from torchrun's environment, else from srun's (only srun sets the step variables), else `default`."""
    name = torchrun_name if "RANK" in os.environ else srun_name if "SLURM_STEP_NUM_TASKS" in os.environ else ""
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"\d+", text):
        raise InputError(f"the environment variable {name}={text} is no number; start with torchrun or srun.")
    return int(text)


def launched() -> tuple[int, int]:
    """Rank and number of processes that share work without communication: no group is opened."""
    if not joined() and world_size() > 1 and "RANK" not in os.environ:
        _refuse_a_shell()
    return rank(), world_size()


def join(timeout_minutes: float | None = None) -> tuple[int, int]:
    """Rank and number of processes; opens the group that the launcher prepared: nccl with GPUs, gloo without.

    timeout_minutes: of collectives, where a process waits for one that no longer answers; None: torch's own.
    """
    if joined() or world_size() == 1:
        return rank(), world_size()
    by_srun = "RANK" not in os.environ
    if by_srun:
        _refuse_a_shell()
        os.environ.setdefault("MASTER_ADDR", _first_host())
        os.environ.setdefault("MASTER_PORT", str(15_000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:] or 0)))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    _chosen["timeout"] = datetime.timedelta(minutes=timeout_minutes) if timeout_minutes else None
    meeting = min(_MEETING, _chosen["timeout"] or _MEETING)  # torch's own is as long as that of a collective
    store = _meet() if by_srun else None
    try:
        store = store or next(dist.rendezvous("env://", rank(), world_size(), timeout=_patience(meeting)))[0]
        dist.init_process_group(backend, rank=rank(), world_size=world_size(), store=store, **_chosen)
    except (RuntimeError, ValueError) as error:  # torch's own for variables, names of hosts, ports and time
        raise InputError(
            f"the {world_size()} processes of this run did not find each other ({first_line(error).rstrip('.')}); "
            "start all of them with torchrun or srun, or unset RANK and WORLD_SIZE for one process."
        ) from error
    atexit.register(leave)
    return rank(), world_size()


def subgroup(ranks: list[list[int]], backend: str | None = None) -> Any:
    """This process's group, where every process is in one of `ranks`, with the timeout of `join`; a collective call."""
    return dist.new_subgroups_by_enumeration(ranks, backend=backend, **_chosen)[0]


def _patience(meeting: datetime.timedelta) -> datetime.timedelta:
    """What torch's store is given: where nobody answers, its clients wait two and a half times as long (measured)."""
    return meeting if rank() == 0 else meeting / 2.5


def _meet() -> dist.Store:
    """The store at MASTER_ADDR through which the processes find each other; without all of them, an InputError."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return dist.TCPStore(host, port, world_size(), is_master=rank() == 0, timeout=_patience(_MEETING))
    except (dist.DistStoreError, RuntimeError) as error:
        raise InputError(
            f"SLURM_STEP_NUM_TASKS={world_size()}, but not all of these processes connected to {host}:{port} within "
            f"{int(_MEETING.total_seconds())} s; start all with `srun python train.py ...`, or unset it for one."
        ) from error


def _refuse_a_shell() -> None:
    """`srun -n4 --pty bash` leaves its variables to every command typed in it, each of which is one process."""
    name = os.environ.get("SLURM_JOB_NAME", "")
    if name in _SHELLS or "SLURM_PTY_PORT" in os.environ or _at_a_terminal():
        tasks = os.environ["SLURM_STEP_NUM_TASKS"]
        raise InputError(
            f"SLURM_STEP_NUM_TASKS={tasks} comes from an interactive shell, where a command is one process; start "
            f"{tasks} with `srun -n{tasks} python train.py ...` or torchrun, or one after `unset SLURM_STEP_NUM_TASKS`."
        )


def _at_a_terminal() -> bool:
    return sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()


def _first_host() -> str:
    """The first machine of SLURM_STEP_NODELIST: `gpu[07-09,12],cpu1` => `gpu07`."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST") or "127.0.0.1"
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", re.split(r",(?![^\[]*\])", nodes)[0])


def leave() -> None:
    if joined():
        dist.destroy_process_group()


def forget() -> None:
    """Leave a group whose other processes are gone, without waiting for them at the end of the program."""
    atexit.unregister(leave)


def lost(error: Exception) -> str | None:
    """What a collective says when another process is gone or does not answer; None for any other fault."""
    if (
        world_size() == 1 or not isinstance(error, RuntimeError) or not _LOST.search(str(error))
    ):  # the group may be left
        return None
    forget()
    return first_line(error).rstrip(".")


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


def gather(value: T) -> list[T]:
    """One picklable value of every process, in the order of ranks, on every process."""
    if not joined():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """The value that the first process holds."""
    if not joined():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box)
    return box[0]


def shared(find: Callable[[], T]) -> T:
    """The result of `find` on the first process, on every process; an InputError of it reaches every process too."""
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


def hardware() -> str:
    """What the processes compute on: the name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # of Linux, which has no call for it
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    return platform.processor() or "CPU"


def barrier() -> None:
    if joined():
        dist.barrier()


def say(sentence: str) -> None:
    """A line on stderr, from the first process only."""
    if rank() == 0:
        print(sentence, file=sys.stderr, flush=True)
