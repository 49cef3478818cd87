"""The loss by noise level: the mean over all levels hides most of the progress."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldmlab import distributed


class NoiseLevels(pl.Callback):
    """Mean loss in `bins` equal parts of the diffusion times, 0 the cleanest; needs extras `loss` and `level`."""

    def __init__(self, bins: int = 10) -> None:
        self.bins = bins
        self._sums: Tensor | None = None  # (2, bins): loss and count, on the device

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Add the micro-batch's images to their bins; log those that saw images since the last row."""
        extras = next((e for e in pl_module.extras.values() if {"loss", "level"} <= e.keys()), None)
        if extras is None:
            return
        loss = extras["loss"].float()  # (B,)
        place = (extras["level"] * self.bins).long().clamp(0, self.bins - 1)  # level: (B,) in [0, 1)
        if self._sums is None:
            self._sums = torch.zeros(2, self.bins, device=loss.device)
        self._sums.index_add_(1, place, torch.stack([loss, torch.ones_like(loss)]))
        if pl_module.step_complete and pl_module.row_due:
            sums, counts = distributed.sum_(self._sums.clone()).tolist()
            self._sums.zero_()
            for index, (total, count) in enumerate(zip(sums, counts, strict=True)):
                if count:
                    pl_module.log(f"loss_by_noise/{index / self.bins:.2f}", total / count)
