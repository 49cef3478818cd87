"""Metrics of the steps, and the rows of the log that they become."""

import math
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.errors import InputError


class StepMetrics:
    """Named scalars by step; reading them is the only moment when the host waits for the device."""

    def __init__(self) -> None:
        self._row: dict[str, Tensor] = {}  # of the unfinished step
        self._last: dict[str, Tensor] = {}  # of the latest finished one
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # on the device, by step
        self.checked: dict[str, list[float]] = {}  # since the last `read`

    def add(self, name: str, value: Tensor, share: float = 1.0) -> None:
        """A part of the running step's value: micro-batches add 1 / accumulate of theirs."""
        part = value.detach().float() * share
        self._row[name] = self._row[name] + part if name in self._row else part

    def close(self, step: int) -> None:
        """The step is complete."""
        self._unread.append((step, self._row))
        self._last, self._row = self._row, {}

    def latest(self) -> str:
        """The first metric of the latest step, of this process: `loss 0.1234`."""
        return next((f"{name} {float(value):.4f}" for name, value in self._last.items()), "")

    def check(self) -> None:
        """Fetch what has not been seen; InputError names the first metric that is not finite, and its step."""
        if not self._unread:
            return
        stacked = torch.stack([value for _, row in self._unread for value in row.values()])
        values = iter(distributed.mean_(stacked).tolist())
        for step, row in self._unread:
            for name in row:
                value = next(values)
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} became {value} at step {step}; no checkpoint was written since. A lower "
                        "optimizer.learning_rate or trainer.gradient_clip=1 may help; the same command resumes the run."
                    )
                self.checked.setdefault(name, []).append(value)
        self._unread = []

    def read(self) -> dict[str, float]:
        """Mean of every metric over the steps since the last call."""
        self.check()
        means = {name: sum(values) / len(values) for name, values in self.checked.items()}
        self.checked = {}
        return means


class Rows(pl.Callback):
    """One row a step at every logger: training metrics when due, and what was logged in validation or by scores.

    It comes after all callbacks that log and before the one that saves checkpoints.
    """

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Training metrics; the row waits for a validation that follows in this step."""
        if not pl_module.step_complete:
            return
        if pl_module.row_due:
            rates = {f"learning_rate/{group}": rate for group, rate in pl_module.rates().items()}
            row = pl_module.metrics.read() | rates | {"images": float(pl_module.position)}
            pl_module.row = row | pl_module.row
            for name, value in pl_module.row.items():  # for callbacks that monitor a metric
                pl.LightningModule.log(pl_module, name, value, logger=False)
        if not pl_module.validation_due:
            self._write(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The row of a step with validation."""
        self._write(trainer, pl_module)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Nothing that is not finite gets into a checkpoint; a collective call."""
        pl_module.metrics.check()
        checkpoint["metrics"] = pl_module.metrics.checked

    @staticmethod
    def _write(trainer: pl.Trainer, stage: Any) -> None:
        if trainer.sanity_checking or not stage.row or not (stage.row_due or stage.row_now):
            return
        row = {name: float(value) for name, value in stage.row.items()}
        stage.row, stage.row_now = {}, False
        for logger in trainer.loggers:
            logger.log_metrics(row, stage.step)
