"""How fast a run is, the FLOPs of its steps, and how much memory it takes."""

import json
import resource
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import mean
from typing import Any

import pytorch_lightning as pl
import torch

from ldmlab import distributed
from ldmlab.nn.cards import card_named


class StepFlops:
    """FLOPs of training on an image, from a program that counts a step without weights.

    The program reads {config, step} as JSON from stdin and prints a number. It runs in a process of its own, so that
    training neither waits for it nor shares its random state, and again when the cost of a step changes.
    """

    def __init__(self, program: Sequence[str], config: Mapping[str, Any]) -> None:
        self.program, self.config = program, config
        self._phase: tuple[Any, ...] | None = None  # of the step that is or was counted
        self._process: subprocess.Popen[str] | None = None
        self._counted: float | None = None

    def of(self, stage: Any) -> float | None:
        """For the stage's running step; None as long as it is not known."""
        if stage.phase != self._phase:
            self.close()
            self._phase, self._counted = stage.phase, None
            self._start(stage.step)
        if self._process is not None and self._process.poll() is not None:
            self._read(self._process)
        return self._counted

    def _start(self, step: int) -> None:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self.program, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )  # a session of its own: Ctrl-C is for the run
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as file:  # it ended at once; the reason is in its output
            json.dump({"config": self.config, "step": step}, file)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as file:
            last = (file.read().strip() or "no output").splitlines()[-1]
        self._process = None
        if process.returncode == 0:
            self._counted = float(last)
        else:
            distributed.say(f"speed/tflops_per_device is not logged, since this step cannot be counted: {last[:300]}")

    def close(self) -> None:
        """End the process, if it still runs."""
        if self._process is not None:
            assert self._process.stdout is not None
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()
            self._process = None


_COUNTED_AFTER_SECONDS = 20.0  # a shorter run is not worth the process that counts its FLOPs


class Throughput(pl.Callback):
    """Speed over the last `window` rows of the log, waiting for data, and peak memory, of all processes.

    speed/images_per_second, speed/images_per_second_and_device; speed/tflops_per_device and, for a GPU of CARDS,
    speed/mfu; speed/data_wait: fraction of the time spent waiting for batches, speed/data_wait_worst of the process
    that waits most; speed/slowest_rank, speed/slowest_rank_seconds, speed/mean_rank_seconds: time per step since the
    last row in waiting for data and forward passes (in backward passes processes wait for each other); memory/: the
    maximum over processes.
    """

    def __init__(self, window: int = 5, flops: StepFlops | None = None) -> None:
        self.flops = flops  # None: TFLOP/s are not logged
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=window + 1)  # time, images, seconds of waiting
        self._forward = ForwardTime()
        self._last = (0, 0.0)  # step and seconds of waiting, at the last row

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start = time.perf_counter()
        self._mark(trainer, pl_module)
        self._last = (pl_module.step, self._marks[-1][2])

    def _mark(self, trainer: Any, pl_module: Any) -> None:
        self._marks.append((time.perf_counter(), pl_module.position, getattr(trainer.datamodule, "waited", 0.0)))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self._forward.start(pl_module.device)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: torch.Tensor) -> None:
        self._forward.stop()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Log the columns of a row; evaluations between two rows are part of its time."""
        if not (pl_module.step_complete and pl_module.row_due):
            return
        self._mark(trainer, pl_module)
        (start, first, waited), (end, last, waited_since) = self._marks[0], self._marks[-1]
        seconds = max(end - start, 1e-9)
        own = self._own_seconds(pl_module.step, waited_since)
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        shares = distributed.gather(((waited_since - waited) / seconds, peak_memory_bytes(), gpu, own))
        waits, memory, gpus, owns = zip(*shares, strict=True)
        speed = (last - first) / seconds / len(shares)
        pl_module.log("speed/images_per_second", speed * len(shares))
        pl_module.log("speed/images_per_second_and_device", speed)
        pl_module.log("speed/data_wait", mean(waits))
        if len(shares) > 1:
            pl_module.log("speed/data_wait_worst", max(waits))
            pl_module.log("speed/slowest_rank", float(owns.index(max(owns))))
            pl_module.log("speed/slowest_rank_seconds", max(owns))
            pl_module.log("speed/mean_rank_seconds", mean(owns))
        pl_module.log("memory/peak_gib", max(memory) / 2**30)
        if gpu:
            pl_module.log("memory/gpu_peak_gib", max(gpus) / 2**30)
        self._log_products(pl_module, speed)

    def _own_seconds(self, step: int, waited: float) -> float:
        """Of a step since the last row: waiting for data and forward passes of this process."""
        (last, before), self._last = self._last, (step, waited)
        return (waited - before + self._forward.take()) / max(step - last, 1)

    def _log_products(self, stage: Any, speed: float) -> None:
        """TFLOP/s of a device and, for a GPU of CARDS, MFU; logged by the first process."""
        if self.flops is None or distributed.rank() or time.perf_counter() - self._start < _COUNTED_AFTER_SECONDS:
            return
        if (flops := self.flops.of(stage)) is None:
            return
        stage.log("speed/tflops_per_device", speed * flops / 1e12)
        card = card_named(torch.cuda.get_device_name()) if stage.device.type == "cuda" else None
        if card is not None:
            stage.log("speed/mfu", speed * flops / 1e12 / card.tflops(stage.trainer.precision))

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """End the process that counts."""
        if self.flops is not None:
            self.flops.close()


class ForwardTime:
    """Seconds from the beginning of a micro-batch to its first loss, on the device; only `take` waits for it."""

    def __init__(self) -> None:
        self._begun: Any = None
        self._passed: list[tuple[Any, Any]] = []  # beginning and end of each, as events of CUDA or seconds

    def start(self, device: torch.device) -> None:
        """A micro-batch begins."""
        self._begun = _event() if device.type == "cuda" else time.perf_counter()

    def stop(self) -> None:
        """A loss is computed; of several in a micro-batch the first one counts."""
        if self._begun is not None:
            end = _event() if isinstance(self._begun, torch.cuda.Event) else time.perf_counter()
            self._passed.append((self._begun, end))
            self._begun = None

    def take(self) -> float:
        """Seconds since the last call."""
        passed, self._passed = self._passed, []
        if passed and isinstance(passed[-1][1], torch.cuda.Event):
            passed[-1][1].synchronize()
            return sum(begin.elapsed_time(end) for begin, end in passed) / 1e3
        return sum(end - begin for begin, end in passed)


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
