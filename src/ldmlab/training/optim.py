"""Optimizers, learning rates and optimizer groups; the configured rate is used unless `lr_scaling` changes it."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmlab.errors import InputError

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
Groups = Mapping[str, list[nn.Parameter]]  # by name; each parameter belongs to exactly one group


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
        for name, low in (("learning_rate", 0.0), ("epsilon", 0.0)):
            if not _number(getattr(self, name)) or not low < getattr(self, name) < math.inf:
                raise InputError(f"optimizer.{name}={getattr(self, name)} must be a number above 0.")
        if not _number(self.weight_decay) or not 0 <= self.weight_decay < math.inf:
            raise InputError(f"optimizer.weight_decay={self.weight_decay} must be a number of 0 or more.")
        betas = self.betas if isinstance(self.betas, list | tuple) else ()
        if len(betas) != 2 or not all(_number(beta) and 0 <= beta < 1 for beta in betas):
            raise InputError(f"optimizer.betas={self.betas} must be two numbers in [0, 1), such as [0.9,0.999].")
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
        """The optimizer of one group."""
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


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Constant:
    """A constant rate after a linear rise."""

    warmup_steps: int = 0
    max_steps: int | None = None  # given to every schedule; unused here

    def __post_init__(self) -> None:
        _check_schedule(self)

    def __call__(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` updates."""
        return _warmup(step, self.warmup_steps)


@dataclass(frozen=True)
class Linear:
    """A straight line from 1 to `final` over the run, after a linear rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end

    def __post_init__(self) -> None:
        _check_schedule(self)

    def __call__(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` updates."""
        return _warmup(step, self.warmup_steps) * (1 + (self.final - 1) * _progress(self, step))


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1 to `final` over the run, after a linear rise."""

    max_steps: int
    warmup_steps: int = 0
    final: float = 0.0  # factor at the end

    def __post_init__(self) -> None:
        _check_schedule(self)

    def __call__(self, step: int) -> float:
        """Factor of the learning rate for the update that follows `step` updates."""
        fall = 0.5 * (1 + math.cos(math.pi * _progress(self, step)))
        return _warmup(step, self.warmup_steps) * (self.final + (1 - self.final) * fall)


def _check_schedule(schedule: Any) -> None:
    """Refuse numbers that no run can use."""
    steps, final = schedule.warmup_steps, getattr(schedule, "final", 0.0)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise InputError(f"lr_schedule.warmup_steps={steps} must be a whole number of 0 or more.")
    if not _number(final) or not 0 <= final < math.inf:
        raise InputError(f"lr_schedule.final={final} must be a number of 0 or more, a factor of the learning rate.")


def _warmup(step: int, warmup_steps: int) -> float:
    return min(1.0, (step + 1) / (warmup_steps + 1))


def _progress(schedule: Linear | Cosine, step: int) -> float:
    """0 at the end of the warm-up, 1 at the end of the run."""
    length = max(schedule.max_steps - schedule.warmup_steps, 1)
    return min(max((step - schedule.warmup_steps) / length, 0.0), 1.0)


def factory_of(given: OptimizerFactory | Mapping[str, OptimizerFactory], group: str) -> OptimizerFactory:
    """The factory of the group's optimizer: its own entry, or the one for all."""
    if not isinstance(given, Mapping):
        return given
    if group not in given:
        raise InputError(
            f"optimizer has entries for {', '.join(given)} but none for {group}; add one or give a single one."
        )
    return given[group]


def made_optimizers(groups: Groups, factory: Callable[[str], OptimizerFactory]) -> dict[str, Optimizer]:
    """One optimizer a group; `initial_lr` keeps the configured rate."""
    made = {group: factory(group)(parameters) for group, parameters in groups.items()}
    for optimizer in made.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return made


def set_rate(optimizer: Optimizer, share: float) -> None:
    """The learning rate of the next update, as a share of the configured one."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * share


def restore_optimizer(optimizer: Optimizer, state: Any, name: str) -> None:
    """The state of a checkpoint, under the configured betas, decay and rate; InputError where it does not fit."""
    configured = [
        {key: value for key, value in group.items() if key not in ("params", "lr")} for group in optimizer.param_groups
    ]
    try:
        optimizer.load_state_dict(state)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the checkpoint's optimizer state of {name} is missing or of another network.") from error
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        group.update(options)
    for parameter, moments in optimizer.state.items():
        for moment in moments.values():
            if isinstance(moment, Tensor) and moment.ndim and moment.shape != parameter.shape:
                raise InputError(f"the checkpoint's optimizer state of {name} has another shape than its weights.")


def check_owned(module: nn.Module, groups: Groups) -> None:
    """Every trainable parameter of the module belongs to exactly one group."""
    owned = [id(p) for parameters in groups.values() for p in parameters]
    assert len(owned) == len(set(owned)), "a parameter belongs to two groups"
    stray = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in set(owned)]
    assert not stray, f"trainable parameters without an optimizer: {stray[:5]}"


@contextmanager
def only_trainable(groups: Groups, group: str) -> Iterator[None]:
    """Inside, only this group's parameters require gradients."""
    others = [p for name, parameters in groups.items() if name != group for p in parameters]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def clip_gradients(parameters: list[nn.Parameter], largest: float | None) -> Tensor:
    """Norm of the gradient before clipping; None clips nothing."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if largest is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm.detach()


def still_frozen(module: nn.Module) -> None:
    """Frozen parts (all parameters frozen) go into evaluation mode."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
        else:
            still_frozen(child)
