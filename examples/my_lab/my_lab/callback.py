"""A number of one's own in metrics.csv and at every logger."""

from typing import Any

import pytorch_lightning as pl
import torch


class WeightNorm(pl.Callback):
    """Length of the trained parameters as one vector."""

    def __init__(self, name: str = "weight_norm") -> None:
        self.name = name

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """For each row of the log."""
        if pl_module.step_complete and pl_module.row_due:
            trained = [p.detach().norm() for p in pl_module.parameters() if p.requires_grad]
            self.log(self.name, torch.stack(trained).norm())
