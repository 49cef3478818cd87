"""Which step was the best so far; the answer is kept in the checkpoints, so that a resumed run knows it too."""

import math
from typing import Literal

from ldmlab.training.callbacks.base import Session


def improves(session: Session, name: str, value: float, mode: Literal["min", "max"], measured_by: str = "") -> bool:
    """Whether `value` is the best yet, and if so note it.

    Values of another name, or measured by something else before a restart, do not count against it.
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
