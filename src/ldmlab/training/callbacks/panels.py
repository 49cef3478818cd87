"""Grids of sample images while training."""

from dataclasses import dataclass

from ldmlab.errors import InputError
from ldmlab.training.callbacks.base import Session, StepCallback


@dataclass
class Panels(StepCallback):
    """The stage's panels (samples, reconstructions) from the same validation images and seed every time."""

    every: int  # steps
    first: bool = False  # also at the first step, to see early that they work

    def __post_init__(self) -> None:
        if self.every < 1:
            raise InputError(f"callbacks.panels.every={self.every} must be at least 1 step.")

    def after_step(self, session: Session) -> None:
        """Draw when due, and at the last step."""
        step, last = session.stage.step, session.stage.max_steps
        if step % self.every == 0 or step == last or (self.first and step == 1):
            session.log_panels()
