"""Commands of ldmlab in forked processes: torch is imported once, so that one costs what it computes.

A command's process has its own session, output files, limits and time; what it leaves is judged from outside.
"""

import contextlib
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MEMORY_BYTES = 6 << 30  # more than any command of the campaign needs, beside what torch maps
HANG_SECONDS = 150.0  # of a command that takes seconds; many times that of the slowest


@dataclass
class Result:
    """How a command ended."""

    argv: list[str]
    code: int | None  # None: still running when its time was over; negative: killed by this signal
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """All that was printed."""
        return self.out + "\n" + self.err

    @property
    def traceback(self) -> bool:
        """Whether a traceback was printed, or it failed without a word; above 128 it stopped as a signal asked."""
        silent = self.code is not None and 0 < self.code < 128 and not self.err.strip()
        return "Traceback (most recent call last)" in self.text or silent

    @property
    def sentence(self) -> str:
        """The refusal that `ldmlab: ...` prints; empty if there is none."""
        lines = [line for line in self.err.splitlines() if line.startswith("ldmlab: ")]
        return lines[-1] if lines and len(lines[-1]) < 1200 else ""


@dataclass(frozen=True)
class Limits:
    """What a command may use."""

    seconds: float = HANG_SECONDS
    file_bytes: int | None = None  # largest file it may write
    environment: Mapping[str, str] = field(default_factory=dict)
    anew: bool = False  # in an interpreter of its own, which reads the environment at its start


Beside = Callable[[list[int]], None]  # runs beside commands, given their processes, and may end them


def preload() -> None:
    """Import what commands use, before anything is forked."""
    import hydra  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401

    import ldmlab.app.compose
    import ldmlab.app.evaluate
    import ldmlab.app.wiring
    import ldmlab.build
    import ldmlab.interop.model_folders
    import ldmlab.training.autoencoder_module
    import ldmlab.training.diffusion_module  # noqa: F401

    torch.set_num_threads(1)


def run(
    argv: Sequence[str],
    folder: Path,
    limits: Limits = Limits(),
    tag: str = "command",
    beside: Beside | None = None,
) -> Result:
    """`argv[0]` is train, evaluate or a command of `ldmlab`; it runs in `folder`, and its output goes beside that."""
    return run_group(argv, folder, [limits], tag, beside)[0]


def run_group(
    argv: Sequence[str], folder: Path, limits: Sequence[Limits], tag: str, beside: Beside | None = None
) -> list[Result]:
    """The same command in a process for each of `limits`, as a launcher starts the ranks of a job."""
    started = time.monotonic()
    places = [folder.parent / (f"{tag}-{rank}" if len(limits) > 1 else tag) for rank in range(len(limits))]
    pids = [_fork(list(argv), folder, limit, place) for limit, place in zip(limits, places, strict=True)]
    watcher = _watch(beside, pids) if beside else None
    ends = _wait(pids, started + max(limit.seconds for limit in limits))
    if watcher is not None:  # it ends when the processes that it looks at are gone, or with a command of its own
        _wait([watcher], time.monotonic() + HANG_SECONDS)
    results = []
    for pid, place in zip(pids, places, strict=True):
        _end_group(pid)
        texts = [Path(f"{place}.{end}").read_text(encoding="utf-8", errors="replace") for end in ("out", "err")]
        code, seconds = ends[pid]
        results.append(Result(list(argv), code, texts[0][-200_000:], texts[1][-200_000:], seconds - started))
    return results


def _watch(beside: Beside, pids: list[int]) -> int:
    watcher = os.fork()
    if watcher == 0:
        os.setsid()
        try:
            with contextlib.suppress(ProcessLookupError):  # all have ended
                beside(pids)
        finally:
            os._exit(0)
    return watcher


def _fork(argv: list[str], folder: Path, limits: Limits, place: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    for end in ("out", "err"):
        Path(f"{place}.{end}").touch()  # a kill may come before the process has opened them
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for path, number in (("/dev/null", 0), (f"{place}.out", 1), (f"{place}.err", 2)):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags, 0o644), number)
        os.chdir(folder)
        sys.path.insert(0, "")  # as `python -m ldmlab` has it
        os.environ.update({"OMP_NUM_THREADS": "1", **limits.environment})  # as `preload` sets it, for a new interpreter
        tempfile.tempdir = None  # found anew in this environment
        _limit(limits)
        if limits.anew:
            os.execv(sys.executable, [sys.executable, "-m", "ldmlab", *argv])
        code = _entry(argv)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code & 0xFF)


def _entry(argv: list[str]) -> int:
    """What the console script does, and the two files at the root, which are its verbs."""
    from ldmlab.app.cli import main

    sys.argv = ["ldmlab", *argv]
    main()
    return 0


def _limit(limits: Limits) -> None:
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY_BYTES, mapped + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if limits.file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits.file_bytes, limits.file_bytes))


def _wait(pids: list[int], deadline: float) -> dict[int, tuple[int | None, float]]:
    """Of each its exit code, negative for a signal, and when it ended; None after killing one whose time is over."""
    ends: dict[int, tuple[int | None, float]] = {}
    while len(ends) < len(pids):
        for pid in pids:
            done, status = os.waitpid(pid, os.WNOHANG) if pid not in ends else (0, 0)
            if done:
                ends[pid] = os.waitstatus_to_exitcode(status), time.monotonic()
            elif pid not in ends and time.monotonic() > deadline:
                _end_group(pid)
                os.waitpid(pid, 0)
                ends[pid] = None, time.monotonic()
        time.sleep(0.02)
    return ends


def _end_group(pid: int) -> None:
    """End what the command left behind, loader workers for instance."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
