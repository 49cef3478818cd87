"""Commands of ldmlab in forked processes: torch is imported once, so that one costs what it computes.

A command's process has its own session, output files, limits and time; what it leaves is judged from outside.
"""

import contextlib
import os
import resource
import signal
import sys
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
        """Whether a traceback was printed, or it failed without a sentence."""
        silent = self.code not in (0, None) and self.code > 0 and not self.err.strip()
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
    kill: Callable[[int], None] | None = None  # runs beside the command and may end it


def preload() -> None:
    """Import what commands use, before anything is forked."""
    import hydra  # noqa: F401
    import pytorch_lightning  # noqa: F401
    import torch
    import torchmetrics  # noqa: F401

    import ldmlab.app.compose
    import ldmlab.app.evaluate
    import ldmlab.app.train
    import ldmlab.app.wiring
    import ldmlab.build
    import ldmlab.interop.model_folders
    import ldmlab.training.autoencoder_module
    import ldmlab.training.diffusion_module  # noqa: F401

    torch.set_num_threads(1)


def run(argv: Sequence[str], folder: Path, limits: Limits = Limits(), tag: str = "command") -> Result:
    """`argv[0]` is train, evaluate or a command of `ldmlab`; it runs in `folder`, and its output goes beside that."""
    out, err = folder.parent / f"{tag}.out", folder.parent / f"{tag}.err"
    started = time.monotonic()
    pid = _fork(list(argv), folder, limits, out, err)
    if limits.kill is not None:
        watcher = os.fork()
        if watcher == 0:
            try:
                limits.kill(pid)
            finally:
                os._exit(0)
    code = _wait(pid, limits.seconds)
    if limits.kill is not None:
        os.kill(watcher, signal.SIGKILL)
        os.waitpid(watcher, 0)
    _end_group(pid)
    seconds = time.monotonic() - started
    texts = [path.read_text(encoding="utf-8", errors="replace")[-200_000:] for path in (out, err)]
    return Result(list(argv), code, texts[0], texts[1], seconds)


def _fork(argv: list[str], folder: Path, limits: Limits, out: Path, err: Path) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        for path, number in ((Path("/dev/null"), 0), (out, 1), (err, 2)):
            flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(path, flags, 0o644), number)
        os.chdir(folder)
        os.environ.update(limits.environment)
        _limit(limits)
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
    """What the console script and the two files at the root do."""
    if argv[0] == "train":
        from ldmlab.app.train import main

        sys.argv = ["train.py", *argv[1:]]
    elif argv[0] == "evaluate":
        from ldmlab.app.evaluate import main

        sys.argv = ["evaluate.py", *argv[1:]]
    else:
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


def _wait(pid: int, seconds: float) -> int | None:
    """The exit code, negative for a signal; None after killing one whose time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    _end_group(pid)
    os.waitpid(pid, 0)
    return None


def _end_group(pid: int) -> None:
    """End what the command left behind, loader workers for instance."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
