"""Averaged weights of a run."""

from typing import Any

import pytorch_lightning as pl

from ldmlab.averaging import AveragedWeights
from ldmlab.errors import InputError


class Averaging(pl.Callback):
    """Keeps `stage.average`, updated once a step; validation, panels and scores use it through `stage.evaluating`."""

    def __init__(self) -> None:
        self._waiting: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The averages wait until the weights are on their device."""
        self._waiting = checkpoint["averaged"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Make the averages, or take up those of a checkpoint."""
        waiting, self._waiting = self._waiting, None
        if pl_module.averaging_decay is None or pl_module.averaged is None:
            return
        name = pl_module.averaged
        options = pl_module.averaging_decay, pl_module.averaging_warmup
        pl_module.average = AveragedWeights(pl_module.saved()[name], *options)
        if waiting is not None:
            if name not in waiting:
                raise InputError(
                    "the checkpoint holds no averaged weights; continue with trainer.averaging_decay=null."
                )
            pl_module.average.load_state_dict(waiting[name])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """One update a step."""
        if pl_module.step_complete and pl_module.average is not None:
            pl_module.average.update()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Under the name of the averaged module."""
        average = pl_module.average
        checkpoint["averaged"] = {} if average is None else {pl_module.averaged: average.state_dict()}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The raw weights come back, also out of an unfinished validation."""
        pl_module.leave_evaluation()
