"""Held-out numbers while training, and the checkpoint that has the best of them."""

from dataclasses import dataclass

from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.callbacks.best import improves


@dataclass
class Validate(StepCallback):
    """Evaluates every `every` steps and at the last one; knows whether the latest numbers are the best so far."""

    every: int  # steps
    judges: bool = True  # False: another callback says which checkpoint is best
    improved: bool = False  # the latest evaluation is the best, until the next step

    def due(self, session: Session) -> bool:
        """Whether this step ends with an evaluation."""
        return session.stage.step % self.every == 0 or session.stage.step == session.stage.max_steps

    def metrics(self, session: Session) -> dict[str, float]:
        """val/ numbers when due."""
        self.improved = False
        if not self.due(session):
            return {}
        numbers = session.evaluate()
        if self.judges and numbers:  # none without held-out data
            stage = session.stage
            self.improved = improves(session, stage.monitor, numbers[stage.monitor], stage.monitor_mode)
        session.notes["held_out"] = {"step": session.stage.step, **numbers}
        return {f"val/{name}": value for name, value in numbers.items()}
