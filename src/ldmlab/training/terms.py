"""The scalars of training, left on their device until someone looks, averaged over processes and checked."""

import math

import torch
from torch import Tensor

from ldmlab import distributed


class Terms:
    """Named scalars by step; reading them is the only moment when the host waits for the device."""

    def __init__(self) -> None:
        self._row: dict[str, Tensor] = {}  # of the unfinished step
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # on the device, by step
        self.checked: dict[str, list[float]] = {}  # since the last `read`

    def add(self, name: str, value: Tensor, share: float = 1.0) -> None:
        """A part of the running step's value: micro-batches add 1 / accumulate of theirs."""
        part = value.detach().float() * share
        self._row[name] = self._row[name] + part if name in self._row else part

    def close(self, step: int) -> None:
        """The step is complete."""
        self._unread.append((step, self._row))
        self._row = {}

    def check(self) -> None:
        """Fetch what has not been seen; FloatingPointError names the first term that is not finite, and its step."""
        if not self._unread:
            return
        stacked = torch.stack([value for _, row in self._unread for value in row.values()])
        values = iter(distributed.mean_(stacked).tolist())
        for step, row in self._unread:
            for name in row:
                value = next(values)
                if not math.isfinite(value):
                    raise FloatingPointError(f"{name} became {value} at step {step}; no checkpoint was written since.")
                self.checked.setdefault(name, []).append(value)
        self._unread = []

    def read(self) -> dict[str, float]:
        """Mean of every term over the steps since the last call."""
        self.check()
        means = {name: sum(values) / len(values) for name, values in self.checked.items()}
        self.checked = {}
        return means
