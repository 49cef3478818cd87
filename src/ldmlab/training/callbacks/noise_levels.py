"""The loss by noise level: the mean over all levels hides most of the progress."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.stage import Batch


@dataclass
class NoiseLevels(StepCallback):
    """Mean loss in `bins` equal parts of the diffusion times, 0 the cleanest; needs extras `loss` and `level`."""

    bins: int = 10
    _sums: Tensor | None = field(default=None, init=False)  # (2, bins): loss and count, on the device

    def after_batch(self, session: Session, batch: Batch) -> None:
        """Add the micro-batch's images to their bins."""
        extras = next((e for e in session.stage.extras.values() if {"loss", "level"} <= e.keys()), None)
        if extras is None:
            return
        loss = extras["loss"].float()  # (B,)
        place = (extras["level"] * self.bins).long().clamp(0, self.bins - 1)  # level: (B,) in [0, 1)
        if self._sums is None:
            self._sums = torch.zeros(2, self.bins, device=loss.device)
        self._sums.index_add_(1, place, torch.stack([loss, torch.ones_like(loss)]))

    def metrics(self, session: Session) -> dict[str, float]:
        """Mean loss of each bin that saw images since the last row."""
        if self._sums is None:
            return {}
        sums, counts = distributed.sum_(self._sums.clone()).tolist()
        self._sums.zero_()
        names = [f"loss_by_noise/{index / self.bins:.2f}" for index in range(self.bins)]
        return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
