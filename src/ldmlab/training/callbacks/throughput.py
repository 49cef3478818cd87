"""How fast a run is and how much memory it takes."""

import resource
import sys
import time
from collections import deque
from dataclasses import dataclass, field

import torch

from ldmlab.training.callbacks.base import Session, StepCallback


@dataclass
class Throughput(StepCallback):
    """Images a second over all processes, over the last `window` rows of the log, and peak memory of this one."""

    window: int = 5  # rows of the log
    _marks: deque[tuple[float, int]] = field(default_factory=deque, init=False)

    def start(self, session: Session) -> None:
        """Start the clock."""
        self._marks = deque([(time.perf_counter(), session.stage.position)], maxlen=self.window + 1)

    def metrics(self, session: Session) -> dict[str, float]:
        """speed/ and memory/ numbers; evaluations between two rows count as time spent."""
        self._marks.append((time.perf_counter(), session.stage.position))
        (start, first), (end, last) = self._marks[0], self._marks[-1]
        numbers = {
            "speed/images_per_second": (last - first) / max(end - start, 1e-9),
            "memory/peak_gib": peak_memory_bytes() / 2**30,
        }
        if torch.cuda.is_available():
            numbers["memory/gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return numbers


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
