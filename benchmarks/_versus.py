"""What the benchmarks against diffusers share: variants in turns in one process, memory of each in its own."""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldmlab.nn import compiling
from ldmlab.nn.compiling import compile_regions

Work = Callable[[], object]
OURS = "ldmlab, bfloat16"
OURS_PLAIN = "ldmlab, float32"
PLAIN = "diffusers as it comes"
TUNED = "diffusers, bfloat16, channels-last"
TUNED_CONTIGUOUS = "diffusers, bfloat16, contiguous"
COMPILED = " + compiled"
LAYOUTS = {TUNED: torch.channels_last, TUNED_CONTIGUOUS: torch.contiguous_format}


@dataclass
class Benchmark:
    """Something to do, in several ways."""

    title: str
    make: Callable[[str, torch.device], Work]  # name of a variant => one round of it; builds what it needs
    images: int  # a round
    flops: Callable[[], int]  # of a round: what the networks have to multiply and add
    only: tuple[str, ...] = ()  # options that choose this one where a program has several
    names: tuple[str, ...] = (OURS, OURS_PLAIN, PLAIN, TUNED, TUNED_CONTIGUOUS)


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that all share."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help="rounds of each variant that are timed")
    made.add_argument("--device", default="cpu")
    made.add_argument("--compile", action="store_true", help="compiled networks too, ours and theirs: minutes on a CPU")
    made.add_argument("--only", help="a single variant in this process, for its peak memory")
    return made


def clock(device: torch.device) -> float:
    """Processor seconds of this process, which other jobs disturb little; on a GPU wall seconds, queue empty."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def run(benchmark: Benchmark, arguments: argparse.Namespace) -> None:
    """Time all variants and print them, or run one and print its peak memory."""
    device = torch.device(arguments.device)
    if arguments.only:
        print(_peak(benchmark.make(arguments.only, device), device))
        return
    names = list(benchmark.names)
    if arguments.compile:
        names += [name + COMPILED for name in names if name not in (PLAIN, OURS_PLAIN)]
    seconds, peak = _timed({name: benchmark.make(name, device) for name in names}, arguments.rounds, device)
    flops = benchmark.flops()
    print(f"{benchmark.title}, {_machine(device)}; bfloat16 matrix peak {peak / 1e9:.0f} GFLOP/s")
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in middle.items():
        memory, rate = _memory(name, benchmark.only) / 2**20, benchmark.images / value
        share = f"{flops / value / peak:.0%} of the peak"
        print(f"{name:45s} {value * 1e3:9.1f} ms  {rate:7.2f} images/s  {memory:6.0f} MiB  {share}", flush=True)
    tuned = min((name for name in names if name.startswith((TUNED, TUNED_CONTIGUOUS))), key=middle.__getitem__)
    best = min((name for name in names if name.startswith(OURS)), key=middle.__getitem__)
    print(f"{best} is {_ratio(seconds, PLAIN, best):.2f} times as fast as {PLAIN} (float32 too:", end=" ")
    print(f"{_ratio(seconds, PLAIN, OURS_PLAIN):.2f}) and {_ratio(seconds, tuned, best):.2f} times as fast as {tuned}")


def _ratio(seconds: dict[str, list[float]], theirs: str, ours: str) -> float:
    """The median over rounds of theirs divided by ours, which other jobs disturb less than single times."""
    return statistics.median(b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True))


def _timed(work: dict[str, Work], rounds: int, device: torch.device) -> tuple[dict[str, list[float]], float]:
    """Seconds of every round by variant, and the peak: the fastest of the products between rounds, FLOP/s."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    square = torch.randn(2048, 2048, device=device).bfloat16()
    work = {**work, "": lambda: square @ square}
    product: list[float] = []
    for i in range(rounds + 1):  # the first warms up
        for name in work if i % 2 else reversed(work):
            start = clock(device)
            work[name]()
            if i:
                (seconds[name] if name else product).append(clock(device) - start)
    return seconds, 2 * 2048**3 / min(product)


def _peak(work: Work, device: torch.device) -> int:
    """Most bytes this process held in three rounds, what importing and building took included; on a GPU of tensors."""
    for _ in range(3):
        work()
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    for line in Path("/proc/self/status").read_text().splitlines():  # ru_maxrss would count the parent's memory
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM; peak memory is measured on Linux only.")


def _memory(name: str, only: tuple[str, ...]) -> int:
    """Peak memory of the same program in a process of its own, doing only this."""
    command = [sys.executable, *sys.argv, *only, "--only", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def _machine(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"


def compiled(call: Any, name: str) -> Any:
    """A network or a method of one, compiled if the variant wants it; ours block by block, as in training."""
    if not name.endswith(COMPILED):
        return call
    if "ldmlab" not in name:
        return torch.compile(call, backend=compiling.BACKEND)
    compile_regions(call if isinstance(call, torch.nn.Module) else call.__self__)
    return call


def layout(name: str) -> torch.memory_format:
    """The memory layout of a variant; ours chooses its own."""
    return LAYOUTS.get(name.removesuffix(COMPILED), torch.contiguous_format)
