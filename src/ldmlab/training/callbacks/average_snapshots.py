"""Averaged weights: the one that a run uses, and several lengths saved, from which any is made afterwards."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldmlab import distributed
from ldmlab.averaging import AveragedWeights, PowerAverage, checked_length, write_snapshot
from ldmlab.disks import disk_errors
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
        pl_module.average = AveragedWeights(pl_module.saved()[name], pl_module.averaging_decay, *pl_module.averaging)
        if waiting is not None:
            if name not in waiting:
                raise InputError(
                    "the checkpoint holds no averaged weights; continue with trainer.averaging_decay=null."
                )
            pl_module.average.load_state_dict(waiting[name])

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.step_complete and pl_module.average is not None:
            pl_module.average.update()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Under the name of the averaged module."""
        average = pl_module.average
        checkpoint["averaged"] = {} if average is None else {pl_module.averaged: average.state_dict()}

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """The raw weights come back, also out of an unfinished validation."""
        pl_module.leave_evaluation()


class PowerAverages(pl.Callback):
    """Update an average of each length once a step; save them in RUN/averages/ every `every` steps.

    They are kept besides the average of `trainer.averaging_decay`, and in checkpoints too.
    """

    def __init__(
        self,
        every: int,  # steps
        lengths: Sequence[float] = (0.05, 0.10),  # standard deviations of the profiles, relative to the training so far
    ) -> None:
        if every < 1:
            raise InputError(f"callbacks.power_averages.every={every} must be at least 1 step.")
        self.every, self.lengths = every, [checked_length(one, "callbacks.power_averages.lengths") for one in lengths]
        if len(set(self.lengths)) < 2:
            raise InputError(
                f"callbacks.power_averages.lengths={list(lengths)}: an average of another length needs at least two "
                "different ones; give for instance [0.05,0.10]."
            )
        self.averages: dict[str, PowerAverage] = {}
        self._waiting: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The averages wait until the weights are on their device."""
        self._waiting = checkpoint.get("power_averages", {})

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Start the averages, or restore those of a checkpoint."""
        waiting, self._waiting = self._waiting, None
        if pl_module.averaged is None:
            raise InputError(f"callbacks.power_averages: stage={pl_module.kind} has no averaged weights; leave it out.")
        module = pl_module.saved()[pl_module.averaged]
        self.averages = {f"{length:.3f}": PowerAverage(module, length) for length in self.lengths}
        if waiting is None:
            return
        if waiting.keys() != self.averages.keys():
            has = ", ".join(waiting) or "none"
            raise InputError(
                f"callbacks.power_averages.lengths={self.lengths}: the checkpoint has these lengths: {has}; others "
                "cannot start in the middle of a run, so keep them, or start a new run."
            )
        for length, state in waiting.items():
            self.averages[length].load_state_dict(state)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """One update a step, and a snapshot when due."""
        if not pl_module.step_complete:
            return
        step, run = pl_module.step, Path(trainer.default_root_dir)
        for length, average in zip(self.lengths, self.averages.values(), strict=True):
            average.update()
            if step % self.every == 0 or step == pl_module.max_steps:
                with disk_errors(run):
                    write_snapshot(run, step, length, pl_module.averaged, average.weights(), distributed.rank() == 0)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["power_averages"] = {length: average.state_dict() for length, average in self.averages.items()}
