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
        self._seen: list[tuple[Tensor, Any]] = []  # losses and levels of micro-batches since the last row, (B,) each

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Log the bins that saw images since the last row, once a row is due: until then nothing is computed."""
        extras = next((e for e in pl_module.extras.values() if {"loss", "level"} <= e.keys()), None)
        if extras is None:
            return
        self._seen.append((extras["loss"], extras["level"]))
        if not (pl_module.step_complete and pl_module.row_due):
            return
        losses, levels = zip(*self._seen, strict=True)
        loss, level = torch.cat(losses).float(), torch.cat([at() if callable(at) else at for at in levels]).float()
        self._seen = []
        place = (level * self.bins).long().clamp(0, self.bins - 1)  # level: in [0, 1)
        sums = torch.zeros(2, self.bins, device=loss.device)
        sums.index_add_(1, place, torch.stack([loss, torch.ones_like(loss)]))
        for index, (total, count) in enumerate(distributed.sum_(sums).T.tolist()):
            if count:
                pl_module.log(f"loss_by_noise/{index / self.bins:.2f}", total / count)
