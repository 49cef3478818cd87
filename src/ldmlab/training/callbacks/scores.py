"""Scores while training: those of evaluate.py for the averaged weights, on few images."""

from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.files import write_json
from ldmlab.training.callbacks.keep_checkpoints import KeepCheckpoints, improves

FOLDER = "in_training"  # in a run folder: step_XXXXXXXX/metrics.json
DISTANCES = ("fid", "sfid", "kid", "cmmd")  # between features of generated and real images, the smaller the better


class Scorer(Protocol):
    """Generates and scores on all processes."""

    def check(self, device: torch.device) -> frozenset[str]: ...  # names of the scores; refuses what cannot be

    def score(self, step: int, model: dict[str, Any]) -> dict[str, Any]: ...  # the content of a metrics.json


class Scores(pl.Callback):
    """Scores every `every` steps and at the last one, with averaged weights, and keeps the best checkpoint."""

    def __init__(
        self,
        every: int,  # steps
        scorer: Scorer,
        monitor: str | None = "fid",  # the distance by which the best checkpoint is chosen; None: not chosen here
    ) -> None:
        if every < 1:
            raise InputError(f"callbacks.scores.every={every} must be at least 1 step.")
        if monitor is not None and monitor not in DISTANCES:
            raise InputError(
                f"callbacks.scores.monitor={monitor} is no distance to real images; choose {', '.join(DISTANCES)}, or "
                "null."
            )
        self.every, self.scorer, self.monitor = every, scorer, monitor
        self.chooses_best = monitor is not None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Make all checks that would otherwise fail after thousands of steps."""
        with pl_module.evaluating(), _full_precision(pl_module):
            given = self.scorer.check(pl_module.device)
        if self.monitor is not None and self.monitor not in given:
            raise InputError(
                f"callbacks.scores.monitor={self.monitor} is not among the scores of callbacks.scores.protocol "
                f"({', '.join(sorted(given))}); choose one of them, or add the metric."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """in_training/ scores when due; the record goes to the run folder."""
        step = pl_module.step
        if not pl_module.step_complete or (step % self.every and step != pl_module.max_steps):
            return
        run = Path(trainer.default_root_dir)
        weights = "averaged" if pl_module.average is not None else "raw"
        with pl_module.evaluating(), _full_precision(pl_module):
            result = self.scorer.score(step, {"path": str(run), "weights": weights})
        if distributed.rank() == 0:
            write_json(run / FOLDER / f"step_{step:08d}" / "metrics.json", result)
        values = {name: float(score["value"]) for name, score in result["scores"].items()}
        if self.monitor is not None:
            how = f"{result['sampling']}, {result['features']}, {result['reference']['manifest_hash']}"
            kept = next(callback for callback in trainer.callbacks if isinstance(callback, KeepCheckpoints))  # type: ignore[attr-defined]
            kept.improved = improves(kept.notes, step, self.monitor, values[self.monitor], "min", how)
        for name, value in values.items():
            pl_module.log(f"{FOLDER}/{name}", value)
        pl_module.row_now = True


def _full_precision(pl_module: Any) -> torch.autocast:
    """Features are compared in float32; the source of the images has its own precision."""
    return torch.autocast(pl_module.device.type, enabled=False)
