"""Validation while training, and the checkpoint with the best metric."""

import math
from dataclasses import dataclass
from typing import Literal

from ldmlab import distributed
from ldmlab.training.callbacks.base import Session, StepCallback


@dataclass
class Validate(StepCallback):
    """Evaluates every `every` steps and at the last one; records whether the latest metrics are the best so far."""

    every: int  # steps
    chooses_best: bool = True  # False: another callback chooses the best checkpoint
    improved: bool = False  # the latest evaluation is the best, until the next step

    def due(self, session: Session) -> bool:
        """Whether this step ends with an evaluation."""
        return session.stage.step % self.every == 0 or session.stage.step == session.stage.max_steps

    def metrics(self, session: Session) -> dict[str, float]:
        """val/ metrics when due."""
        self.improved = False
        if not self.due(session):
            return {}
        stage, values = session.stage, session.evaluate()
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            best = session.notes.get("best", {}).get("step")
            kept = f"the best checkpoint stays that of step {best}" if best else "there is no best checkpoint yet"
            distributed.say(f"step {stage.step}: val/{bad[0]} is {values[bad[0]]}, which is never the best; {kept}")
        if self.chooses_best and values:  # none without validation data
            self.improved = improves(session, stage.monitor, values[stage.monitor], stage.monitor_mode)
        session.notes["val"] = {"step": stage.step, **values}
        skipped = {"data/val_skipped": float(len(session.val_skipped))} if session.val_skipped else {}
        return {f"val/{name}": value for name, value in values.items()} | skipped


def improves(session: Session, name: str, value: float, mode: Literal["min", "max"], measured_by: str = "") -> bool:
    """Whether `value` is the best yet, and if so note it.

    Values of another metric, or measured in another way before a restart, are ignored.
    """
    if not math.isfinite(value):
        return False
    before = session.notes.get("best")
    if before is not None and (before["name"], before.get("measured_by", "")) == (name, measured_by):
        better = value < before["value"] if mode == "min" else value > before["value"]
        if not better:
            return False
    note = {"name": name, "value": value, "step": session.stage.step}
    session.notes["best"] = {**note, "measured_by": measured_by} if measured_by else note
    return True
