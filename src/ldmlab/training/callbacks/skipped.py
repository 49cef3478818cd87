"""Images that could not be read: counted, named, and the end of the run above a share."""

from dataclasses import dataclass, field

import torch

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.stage import Batch

_BEFORE_JUDGING = 1000  # images: a share of fewer says little


@dataclass
class Skipped(StepCallback):
    """Counts `skipped` of the batches and stops the run above `max_fraction`."""

    max_fraction: float = 0.01  # of the images asked for
    _here: int = field(default=0, init=False)  # since the last row, on this process
    _example: str = field(default="", init=False)
    _start: int = field(default=0, init=False)

    def start(self, session: Session) -> None:
        """Shares count from the start of this process."""
        self._start = session.stage.position

    def after_batch(self, session: Session, batch: Batch) -> None:
        """Note what the loader had to replace."""
        names = batch.get("skipped") or []
        self._here += len(names)
        if names:
            self._example = str(names[0])

    def metrics(self, session: Session) -> dict[str, float]:
        """data/skipped, the count so far; InputError above the set share."""
        count = torch.tensor(float(self._here), device=session.stage.device)
        session.skipped += int(distributed.sum_(count))
        self._here = 0
        seen = session.stage.position - self._start
        if session.skipped > self.max_fraction * max(seen, _BEFORE_JUDGING):
            example = f" (such as {self._example})" if self._example else ""
            raise InputError(
                f"{session.skipped} of {seen} images could not be read{example}, more than "
                f"callbacks.skipped.max_fraction={self.max_fraction}; mend the shards or raise it."
            )
        return {"data/skipped": float(session.skipped)}
