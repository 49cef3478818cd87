"""Optimizers and learning rates; the configured rate is used unless `lr_scaling` changes it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ldmlab.errors import InputError, one_of
from ldmlab.sharded import StoredTensor, laid_out

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), one fused kernel; decay 0 is plain Adam."""

    idle_without = "decay_vectors: weight_decay"
    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    decay_vectors: bool = True  # False: gains and biases are not decayed
    lr_scaling: Literal["none", "official"] = "none"  # official: learning_rate is per image of the global batch
    global_batch: int = 1  # images a step over all processes; wiring fills it in

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"optimizer.{name}={getattr(self, name)} must be a number above 0.")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"optimizer.weight_decay={self.weight_decay} must be a number of 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas={self.betas} must be two numbers in [0, 1), such as [0.9,0.999].")
        one_of("optimizer.lr_scaling", self.lr_scaling, ("none", "official"))

    @property
    def rate(self) -> float:
        """The learning rate used: official is the paper code's accumulate * GPUs * batch * base."""
        return self.learning_rate * (self.global_batch if self.lr_scaling == "official" else 1)

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        decayed = [p for p in parameters if self.decay_vectors or p.ndim > 1]
        plain = [p for p in parameters if not (self.decay_vectors or p.ndim > 1)]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}]
        groups += [{"params": plain, "weight_decay": 0.0}] if plain else []
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(groups, lr=self.rate, betas=betas, eps=self.epsilon, fused=fused)

    def __str__(self) -> str:
        rule = "as configured"
        if self.lr_scaling == "official":
            rule = f"{self.learning_rate:g} x {self.global_batch} images a step"
        return f"AdamW, learning rate {self.rate:g} ({rule})"


class _Schedule:
    """A linear rise, then a curve of its own: step => factor of the rate for the update after `step` updates."""

    warmup_steps: int
    max_steps: int | None
    final: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise InputError(f"lr_schedule.warmup_steps={self.warmup_steps} must be a whole number of 0 or more.")
        if not 0 <= (final := self.final) < math.inf:
            raise InputError(f"lr_schedule.final={final} must be a number of 0 or more, a factor of the learning rate.")

    def __call__(self, step: int) -> float:
        rise = min(1.0, (step + 1) / (self.warmup_steps + 1))
        length = max((self.max_steps or 0) - self.warmup_steps, 1)
        return rise * self._curve(min(max((step - self.warmup_steps) / length, 0.0), 1.0))

    def _curve(self, progress: float) -> float:
        """progress: 0 at the end of the warm-up, 1 at the end of the run."""
        return 1.0


@dataclass(frozen=True)
class Constant(_Schedule):
    """A constant rate after a linear rise."""

    warmup_steps: int = 0
    max_steps: int | None = None  # given to every schedule; unused here


@dataclass(frozen=True)
class Linear(_Schedule):
    """A straight line from 1 to `final` over the run, after a linear rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end

    def _curve(self, progress: float) -> float:
        return 1 + (self.final - 1) * progress


@dataclass(frozen=True)
class Cosine(_Schedule):
    """Half a cosine from 1 to `final` over the run, after a linear rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end

    def _curve(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class InverseSqrt(_Schedule):
    """1 until `steady_steps`, then sqrt(steady_steps / step), after a linear rise (Karras et al. 2024).

    EDM2's rise is step / warmup_steps, whose first update has rate 0 and changes nothing; here it is (step + 1) /
    (warmup_steps + 1), higher by at most 1 / (warmup_steps + 1): 0.0002 of the rate with EDM2-S's 4,882 steps.
    """

    steady_steps: int
    warmup_steps: int = 0
    max_steps: int | None = None  # given to every schedule; unused here

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steady_steps < 1:
            raise InputError(f"lr_schedule.steady_steps={self.steady_steps} must be at least 1.")

    def __call__(self, step: int) -> float:
        return super().__call__(step) / math.sqrt(max(step / self.steady_steps, 1.0))


@dataclass(frozen=True)
class WarmupStableDecay(_Schedule):
    """1 after a linear rise, then a straight line to `final` over the last `decay` of what follows the rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end
    decay: float = 0.2  # in 0 .. 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise InputError(f"lr_schedule.decay={self.decay} must be above 0 and at most 1, a part of the run.")

    def _curve(self, progress: float) -> float:
        return 1 + (self.final - 1) * max(1 - (1 - progress) / self.decay, 0.0)


class RateBySteps(LRScheduler):
    """The configured rates times a factor of our step counter, which no state needs to keep."""

    def __init__(self, optimizer: Optimizer, factor: Callable[[], float]) -> None:
        self.factor = factor
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group for the next update."""
        return [rate * self.factor() for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        """Before an update; torch's own counts its calls and must follow the update."""
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


def restore_optimizer(optimizer: Optimizer, state: Any, name: str) -> None:
    """The state of a checkpoint, under the configured options; InputError where it does not fit.

    States take the layout of their parameter: a fused optimizer pairs the elements of both by their place in memory.
    """
    configured = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        own = {n: state["state"][n] for n in numbers if n in state["state"]}
        laid = {n: _like(p, own[n], name) for n, p in zip(numbers, parameters, strict=True) if n in own}
        optimizer.load_state_dict({**state, "state": laid})
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint's optimizer state of {name} is missing or of another network.") from error
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)


def _like(parameter: nn.Parameter, moments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The states of one parameter in its layout, and in its part of it where it is sharded."""
    made = dict(moments)
    for kind, moment in moments.items():
        if not isinstance(moment, Tensor | StoredTensor):
            continue
        if not moment.ndim:
            made[kind] = laid_out(moment, None).clone()  # else it stays in the file's memory
            continue
        if moment.shape != parameter.shape:
            raise InputError(f"the checkpoint's optimizer state of {name} has another shape than its weights.")
        made[kind] = torch.empty_like(parameter, dtype=moment.dtype).copy_(laid_out(moment, parameter))
    return made
