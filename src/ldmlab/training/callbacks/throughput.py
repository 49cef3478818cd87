"""How fast a run is and how much memory it takes."""

import resource
import sys
import time
from collections import deque
from typing import Any

import pytorch_lightning as pl
import torch


class Throughput(pl.Callback):
    """Images a second over all processes, over the last `window` rows of the log, and peak memory of this one."""

    def __init__(self, window: int = 5) -> None:
        self._marks: deque[tuple[float, int]] = deque(maxlen=window + 1)  # time and images

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the clock."""
        self._marks.append((time.perf_counter(), pl_module.position))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """speed/ and memory/ numbers; evaluations between two rows count as time spent."""
        if not (pl_module.step_complete and pl_module.row_due):
            return
        self._marks.append((time.perf_counter(), pl_module.position))
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        pl_module.log("speed/images_per_second", (last - first) / max(end - start, 1e-9))
        pl_module.log("memory/peak_gib", peak_memory_bytes() / 2**30)
        if torch.cuda.is_available():
            pl_module.log("memory/gpu_peak_gib", torch.cuda.max_memory_allocated() / 2**30)


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
