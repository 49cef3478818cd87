"""Optimizers and learning rates; the configured rate is the rate used unless `lr_scaling` says otherwise."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ldmlab.errors import InputError


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), one fused kernel; decay 0 is plain Adam."""

    learning_rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    decay_vectors: bool = True  # False: gains and biases are not decayed
    lr_scaling: Literal["none", "official"] = "none"  # official: learning_rate is per image of the global batch
    global_batch: int = 1  # images a step over all processes; wiring fills it in

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise InputError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"optimizer.betas={list(self.betas)} must lie in [0, 1).")
        if self.epsilon <= 0:
            raise InputError(f"optimizer.epsilon={self.epsilon} must be above 0.")
        if self.weight_decay < 0:
            raise InputError(f"optimizer.weight_decay={self.weight_decay} must not be below 0.")
        if self.lr_scaling not in ("none", "official"):
            raise InputError(f"optimizer.lr_scaling={self.lr_scaling} is unknown; choose none or official.")

    @property
    def rate(self) -> float:
        """The learning rate used: official is the paper code's accumulate * GPUs * batch * base."""
        return self.learning_rate * (self.global_batch if self.lr_scaling == "official" else 1)

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        """The optimizer of one player."""
        decayed = [p for p in parameters if self.decay_vectors or p.ndim > 1]
        plain = [p for p in parameters if not (self.decay_vectors or p.ndim > 1)]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": self.weight_decay}]
        if plain:
            groups.append({"params": plain, "weight_decay": 0.0})
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(groups, lr=self.rate, betas=betas, eps=self.epsilon, fused=fused)

    def __str__(self) -> str:
        rule = "as configured"
        if self.lr_scaling == "official":
            rule = f"{self.learning_rate:g} x {self.global_batch} images a step"
        return f"AdamW, learning rate {self.rate:g} ({rule})"


@dataclass(frozen=True)
class Constant:
    """A constant rate after a linear rise."""

    warmup_steps: int = 0
    max_steps: int | None = None  # given to every schedule; unused here

    def __call__(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` updates."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Linear:
    """A straight line from 1 to `final` over the run, after a linear rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end

    def __call__(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` updates."""
        return _warmup(step, self.warmup_steps) * (1 + (self.final - 1) * _progress(self, step))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to `final` over the run, after a linear rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end

    def __call__(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` updates."""
        fall = 0.5 * (1 + math.cos(math.pi * _progress(self, step)))
        return _warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * fall)


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(schedule: Linear | Cosine, step: int) -> float:
    """0 at the end of the warm-up, 1 at the end of the run."""
    length = max(schedule.max_steps - schedule.warmup_steps, 1)
    return min(max((step - schedule.warmup_steps) / length, 0.0), 1.0)
