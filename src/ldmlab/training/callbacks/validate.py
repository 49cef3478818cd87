"""Held-out numbers while training, and the checkpoint that has the best of them."""

import math
from dataclasses import dataclass

from ldmlab.training.callbacks.base import Session, StepCallback


@dataclass
class Validate(StepCallback):
    """Evaluates every `every` steps and at the last one; knows whether the latest numbers are the best so far."""

    every: int  # steps
    improved: bool = False  # the latest evaluation is the best, until the next step

    def due(self, session: Session) -> bool:
        """Whether this step ends with an evaluation."""
        return session.stage.step % self.every == 0 or session.stage.step == session.stage.max_steps

    def metrics(self, session: Session) -> dict[str, float]:
        """held_out/ numbers when due."""
        self.improved = False
        if not self.due(session):
            return {}
        numbers = session.evaluate()
        self.improved = self._is_best(session, numbers)
        session.notes["held_out"] = {"step": session.stage.step, **numbers}
        return {f"held_out/{name}": value for name, value in numbers.items()}

    def _is_best(self, session: Session, numbers: dict[str, float]) -> bool:
        stage = session.stage
        if not numbers:  # no held-out data
            return False
        value, before = numbers[stage.monitor], session.notes.get("best")
        if not math.isfinite(value):
            return False
        better = before is None or (value < before["value"] if stage.monitor_mode == "min" else value > before["value"])
        if better:
            session.notes["best"] = {"name": stage.monitor, "value": value, "step": stage.step}
        return better
