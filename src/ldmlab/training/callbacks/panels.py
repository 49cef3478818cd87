"""Grids of sample images while training."""

from typing import Any

import pytorch_lightning as pl

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.training.loggers import log_images


class Panels(pl.Callback):
    """The stage's panels (samples, reconstructions) from the same validation images and seed every time."""

    def __init__(self, every: int, first: bool = False) -> None:
        if every < 1:
            raise InputError(f"callbacks.panels.every={every} must be at least 1 step.")
        self.every, self.first = every, first  # steps; also at the first step, to see early that they work

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """When due and at the last step: made by all processes, logged by the first."""
        step = pl_module.step
        due = step % self.every == 0 or step == pl_module.max_steps or (self.first and step == 1)
        if not pl_module.step_complete or not due:
            return
        with pl_module.evaluating():
            batches = trainer.datamodule.val()  # type: ignore[attr-defined]
            device = pl_module.device
            panels = pl_module.panels(pl_module.transfer_batch_to_device(part, device, 0) for part in batches)
        for name, images in panels.items() if distributed.rank() == 0 else ():
            title = pl_module.panel_titles.get(name, "")
            log_images(trainer.loggers, name, images, step, pl_module.panel_labels.get(name), title)
