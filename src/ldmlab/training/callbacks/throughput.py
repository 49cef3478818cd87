"""How fast a run is and how much memory it takes."""

import resource
import sys
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch

from ldmlab import distributed


class Throughput(pl.Callback):
    """Speed over the last `window` rows of the log, waiting for data, and peak memory, of all processes.

    speed/images_per_second, speed/images_per_second_and_device; speed/data_wait: share of the time that a process waits
    for batches, speed/data_wait_worst of the one that waits most; memory/: of the process with most.
    """

    def __init__(self, window: int = 5) -> None:
        self._marks: deque[tuple[float, int, float]] = deque(maxlen=window + 1)  # time, images, seconds of waiting

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._mark(trainer, pl_module)

    def _mark(self, trainer: Any, pl_module: Any) -> None:
        self._marks.append((time.perf_counter(), pl_module.position, getattr(trainer.datamodule, "waited", 0.0)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """The numbers of a row; evaluations between two rows count as time spent."""
        if not (pl_module.step_complete and pl_module.row_due):
            return
        self._mark(trainer, pl_module)
        (start, first, waited), (end, last, waited_since) = self._marks[0], self._marks[-1]
        seconds = max(end - start, 1e-9)
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        shares = distributed.gather(((waited_since - waited) / seconds, peak_memory_bytes(), gpu))
        waits, memory, gpus = zip(*shares, strict=True)
        pl_module.log("speed/images_per_second", (last - first) / seconds)
        pl_module.log("speed/images_per_second_and_device", (last - first) / seconds / len(shares))
        pl_module.log("speed/data_wait", sum(waits) / len(waits))
        if len(shares) > 1:
            pl_module.log("speed/data_wait_worst", max(waits))
        pl_module.log("memory/peak_gib", max(memory) / 2**30)
        if gpu:
            pl_module.log("memory/gpu_peak_gib", max(gpus) / 2**30)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
