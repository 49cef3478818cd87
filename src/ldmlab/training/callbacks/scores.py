"""Scores while training: those of evaluate.py for the averaged weights, on few images."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.files import write_json
from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.callbacks.validate import improves

FOLDER = "in_training"  # in a run folder: step_XXXXXXXX/metrics.json
DISTANCES = ("fid", "sfid", "kid", "cmmd")  # between features of generated and real images, the smaller the better


class Scorer(Protocol):
    """Generates and scores on all processes."""

    def check(self, device: torch.device) -> frozenset[str]: ...  # names of the scores; refuses what cannot be

    def score(self, step: int, model: dict[str, Any]) -> dict[str, Any]: ...  # the content of a metrics.json


@dataclass
class Scores(StepCallback):
    """Scores every `every` steps and at the last one, with averaged weights, and keeps the best checkpoint."""

    every: int  # steps
    scorer: Scorer
    monitor: str | None = "fid"  # the distance by which the best checkpoint is chosen; None: not chosen here
    chooses_best: bool = field(default=True, init=False)
    improved: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.chooses_best = self.monitor is not None
        if self.every < 1:
            raise InputError(f"callbacks.scores.every={self.every} must be at least 1 step.")
        if self.monitor is not None and self.monitor not in DISTANCES:
            raise InputError(
                f"callbacks.scores.monitor={self.monitor} is no distance to real images; choose "
                f"{', '.join(DISTANCES)}, or null."
            )

    def start(self, session: Session) -> None:
        """Make all checks that would otherwise fail after thousands of steps."""
        with session.stage.evaluating(), self._full_precision(session):
            given = self.scorer.check(session.stage.device)
        if self.monitor is not None and self.monitor not in given:
            raise InputError(
                f"callbacks.scores.monitor={self.monitor} is not among the scores of callbacks.scores.protocol "
                f"({', '.join(sorted(given))}); choose one of them, or add the metric."
            )

    def evaluate(self, session: Session) -> dict[str, float]:
        """in_training/ scores when due; the record goes to the run folder."""
        self.improved = False
        step, last = session.stage.step, session.stage.max_steps
        if step % self.every and step != last:
            return {}
        weights = "averaged" if session.stage.average is not None else "raw"
        with session.stage.evaluating(), self._full_precision(session):
            result = self.scorer.score(step, {"path": str(session.run.path), "weights": weights})
        if distributed.rank() == 0:
            write_json(session.run.path / FOLDER / f"step_{step:08d}" / "metrics.json", result)
        values = {name: float(score["value"]) for name, score in result["scores"].items()}
        if self.monitor is not None:
            how = f"{result['sampling']}, {result['features']}, {result['reference']['manifest_hash']}"
            self.improved = improves(session, self.monitor, values[self.monitor], "min", how)
        return {f"{FOLDER}/{name}": value for name, value in values.items()}

    def _full_precision(self, session: Session) -> torch.autocast:
        """Features are compared in float32; the source of the images has its own precision."""
        return torch.autocast(session.stage.device.type, enabled=False)
