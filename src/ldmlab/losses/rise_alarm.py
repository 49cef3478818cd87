"""Watches whether the reconstruction gets worse once the adversary has joined."""

import torch
from torch import Tensor

_MEMORY = 0.98  # of the running means: about fifty steps


class RiseAlarm:
    """Compares running means of a loss before and after a start; read at intervals, since reading waits for a GPU."""

    def __init__(self, limit: float = 0.25, every_steps: int = 50) -> None:
        self.limit = limit  # share of the level before the start by which the loss may rise
        self.every_steps = every_steps
        self._before: Tensor | None = None
        self._after: Tensor | None = None
        self._steps_after = 0

    def update(self, value: Tensor, started: bool) -> float | None:
        """One step's loss => the rise as a share when it is beyond the limit, else None."""
        value = value.detach()
        if not started:
            self._before = value if self._before is None else torch.lerp(value, self._before, _MEMORY)
            return None
        if self._before is None:  # resumed after the start: nothing to compare with
            return None
        self._after = value if self._after is None else torch.lerp(value, self._after, _MEMORY)
        self._steps_after += 1
        if self._steps_after % self.every_steps:
            return None
        rise = float(self._after / self._before) - 1.0
        return rise if rise > self.limit else None
