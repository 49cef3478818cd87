"""Averaged weights with the paper's warm-up: decay = min(decay, (1 + n) / (10 + n)), n counting optimizer updates.

With `warmup` = (inv_gamma, power) it is min(decay, 1 - (1 + n / inv_gamma)^-power), as in diffusers' EMAModel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ldmlab.sharded import laid_out


class AveragedWeights:
    """An exponential moving average of a module's trainable parameters, at least float32, besides the raw ones."""

    def __init__(self, module: nn.Module, decay: float, warmup: tuple[float, float] | None = None) -> None:
        self.decay, self.warmup = decay, warmup
        self.updates = 0
        self._live = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {
            name: p.detach().clone().to(torch.promote_types(p.dtype, torch.float32)) for name, p in self._live.items()
        }

    @torch.no_grad()
    def update(self) -> None:
        """One optimizer update of the live weights has been made: average += (1 - decay) (live - average)."""
        self.updates += 1
        decay = self._kept()
        average = list(self._average.values())
        live = [p.detach().to(a.device, a.dtype) for p, a in zip(self._live.values(), average, strict=True)]
        torch._foreach_lerp_(average, live, 1 - decay)

    def _kept(self) -> float:
        """The decay at this update."""
        if self.warmup is None:
            return min(self.decay, (1 + self.updates) / (10 + self.updates))
        inv_gamma, power = self.warmup
        return min(self.decay, 1 - (1 + self.updates / inv_gamma) ** -power)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the context the module holds the averaged weights."""
        raw = {name: p.detach().clone() for name, p in self._live.items()}
        self._write(self._average)
        try:
            yield
        finally:
            self._write(raw)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, p in self._live.items():
            p.copy_(values[name])

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights under the names of the live ones."""
        return dict(self._average)

    def state_dict(self) -> dict[str, object]:
        """Averages, the decay and the number of updates, tensors and plain types only."""
        return {"decay": self.decay, "updates": self.updates, "weights": self.weights()}

    def load_state_dict(self, state: dict) -> None:
        """The inverse of `state_dict`; names must match exactly."""
        if state["weights"].keys() != self._average.keys():
            raise ValueError("the averaged weights belong to another network: parameter names differ")
        self.updates = int(state["updates"])
        for name, value in state["weights"].items():
            self._average[name].copy_(laid_out(value, self._average[name]))
