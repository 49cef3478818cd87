"""Lightning's own callbacks and loggers in a run: they get Lightning's Trainer and the hooks that it can serve.

Validation, checkpoints and optimizer steps are this project's, so callbacks that need Lightning's are refused by name.
"""

import inspect
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger as LightningLogger
from pytorch_lightning.loggers import TensorBoardLogger

from ldmlab.contracts import Callback, check_part
from ldmlab.errors import InputError
from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.loggers import Logger
from ldmlab.training.run_folder import RunFolder

SERVED = {  # hooks that are called; the whole run is one epoch
    *("setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end", "on_exception"),
    *("on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"),
    *("on_before_backward", "on_after_backward", "on_validation_start", "on_validation_end"),
}
_OTHER_RUNS = ("on_test", "on_predict", "on_sanity")  # training never gets there
_LOGGER_MEMBERS = ("open", "numbers", "image", "close")


def run_callbacks(parts: Sequence[tuple[str, Any]], validate_every: int) -> list[Any]:
    """Callbacks by (option, part): ours unchanged, Lightning's wrapped in one that calls them."""
    lightning = [(where, part) for where, part in parts if isinstance(part, pl.Callback)]
    for where, part in lightning:
        _check_hooks(where, part)
    ours = [(where, part) for where, part in parts if not isinstance(part, pl.Callback)]
    for where, part in ours:
        check_part(part, Callback, where, type(part).__qualname__)
    served = [LightningCallbacks([part for _, part in lightning], validate_every)] if lightning else []
    return [*(part for _, part in ours), *served]


def run_loggers(parts: Sequence[tuple[str, Any]]) -> list[Any]:
    """Loggers by (option, part): ours unchanged, Lightning's wrapped."""
    for where, part in parts:
        missing = [name for name in _LOGGER_MEMBERS if not callable(getattr(part, name, None))]
        if missing and not isinstance(part, LightningLogger):
            raise InputError(
                f"{where}: {type(part).__qualname__} has no {missing[0]}(); a logger has {', '.join(_LOGGER_MEMBERS)} "
                "(ldmlab.training.loggers), or is one of Lightning's."
            )
    return [LoggerOfLightning(part) if isinstance(part, LightningLogger) else part for _, part in parts]


_DECIDING = (
    pl.callbacks.GradientAccumulationScheduler,
    pl.callbacks.BatchSizeFinder,
    pl.callbacks.LearningRateFinder,
    pl.callbacks.StochasticWeightAveraging,
)


def _check_hooks(where: str, callback: pl.Callback) -> None:
    """Refuse hooks that this loop never calls, and callbacks that would decide its steps."""
    if isinstance(callback, _DECIDING):
        raise InputError(
            f"{where}: {type(callback).__qualname__} changes how Lightning steps the optimizer, which this loop does "
            "itself; remove it, and set trainer.accumulate, trainer.micro_batch or optimizer.learning_rate."
        )
    hooks = [name for name, _ in inspect.getmembers(pl.Callback, inspect.isfunction) if not name.startswith("_")]
    own = [name for name in hooks if getattr(type(callback), name) is not getattr(pl.Callback, name)]
    if unserved := [name for name in own if name not in SERVED and not name.startswith(_OTHER_RUNS)]:
        raise InputError(
            f"{where}: {type(callback).__qualname__} needs Lightning's hook {unserved[0]}, which this loop does not "
            "call (validation, checkpoints and optimizer steps are its own); leave it out or write a StepCallback."
        )


class LightningCallbacks(StepCallback):
    """Lightning's callbacks of a run; what they log goes into the rows of this project's loggers."""

    def __init__(self, callbacks: Sequence[pl.Callback], validate_every: int) -> None:
        self.callbacks, self.validate_every = list(callbacks), validate_every
        self.logger = _Rows()

    def evaluate(self, session: Session) -> dict[str, float]:
        """Scalars logged since the last step; the validation hooks are called first."""
        stage = session.stage
        if stage.step % self.validate_every == 0 or stage.step == stage.max_steps:
            for hook in ("on_validation_start", "on_validation_end"):
                for callback in self.callbacks:
                    getattr(callback, hook)(stage.trainer, stage)
        return self.logger.taken()


class _Rows(LightningLogger):
    """The logger that Lightning's Trainer sees: keeps scalars until the next row."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self._waiting: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._waiting |= {name: float(value) for name, value in metrics.items() if name != "epoch"}

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Settings reach the loggers by themselves."""

    def taken(self) -> dict[str, float]:
        """The pending scalars; they are removed here."""
        waiting, self._waiting = self._waiting, {}
        return waiting


class LoggerOfLightning(Logger):
    """One of Lightning's loggers behind this project's four calls."""

    def __init__(self, logger: LightningLogger) -> None:
        self.logger = logger

    def open(self, run: RunFolder, settings: dict[str, Any], step: int) -> None:
        """The settings of the run; where the logger writes is its own option."""
        self.logger.log_hyperparams(settings)

    def numbers(self, values: dict[str, float], step: int) -> None:
        """Scalars of a step."""
        self.logger.log_metrics(values, step)

    def image(self, name: str, grid: np.ndarray, step: int) -> None:
        """A grid, where the logger has a place for images; samples/ has it anyway."""
        if isinstance(self.logger, TensorBoardLogger):
            self.logger.experiment.add_image(name, grid, step, dataformats="HWC")
        elif hasattr(self.logger, "log_image"):
            self.logger.log_image(name, [grid], step=step)

    def close(self, success: bool) -> None:
        """Flushes what is waiting."""
        self.logger.save()
        self.logger.finalize("success" if success else "failed")
