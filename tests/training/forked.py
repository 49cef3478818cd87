"""Children of the test process that can be killed, signalled, or joined into a group."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

# Where the first backward pass of a process comes after its first compiled network, autograd starts threads, and then
# no forked child may run a backward pass.
torch.zeros((), requires_grad=True).backward()


def start(function: Callable[..., Any], *arguments: Any, log: Path | None = None) -> ForkProcess:
    """Run in a forked child; `log` takes what it prints."""
    process = multiprocessing.get_context("fork").Process(target=_child, args=(function, arguments, log))
    process.start()
    return process


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], log: Path | None) -> None:
    torch.set_num_threads(1)
    if log is not None:
        sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115 - until the child ends
    function(*arguments)


def group(world: int, function: Callable[..., Any], *arguments: Any, log: Path | None = None) -> list[ForkProcess]:
    """Start `function(rank, world, *arguments)` in as many children as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [start(_member, rank, world, port, function, arguments, log=log) for rank in range(world)]


def _member(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    function(rank, world, *arguments)


def finish(*processes: ForkProcess, seconds: float = 120) -> list[int | None]:
    """Exit codes; a child that hangs is killed and counts as None."""
    codes = []
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            codes.append(None)
        else:
            codes.append(process.exitcode)
    return codes


def same(a: Any, b: Any, path: str = "") -> None:
    """Assert that two checkpoint parts are equal bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for name in a:
            same(a[name], b[name], f"{path}/{name}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for index, (left, right) in enumerate(zip(a, b, strict=True)):
            same(left, right, f"{path}/{index}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path
