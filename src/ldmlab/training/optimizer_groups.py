"""Which parameters are trained, by which optimizer and schedule of its rate, and their state in checkpoints.

Gradients of several groups are averaged over processes while the backward pass still runs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmlab.errors import InputError
from ldmlab.sharded import by_layout
from ldmlab.training.muon import Joined, MuonAdamW, Part, hidden_matrices
from ldmlab.training.optim import OptimizerFactory, RateBySteps, restore_optimizer
from ldmlab.training.validation import Validated

_BUCKET_ELEMENTS = 6_500_000  # 25 MB of float32 a bucket


class MeanGradients:
    """Replaces every gradient of a group by its mean over processes, in flat buckets of about 25 MB.

    A bucket is sent as soon as its gradients are complete, beginning with the last parameters, whose gradients come
    first. Buckets leave in one order on all processes, whatever parameters a process's loss reaches; a gradient that
    one of them does not have counts as zero.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._buckets: list[list[nn.Parameter]] = []
        room = 0
        for parameter in reversed(parameters):
            if room <= 0 or parameter.dtype != self._buckets[-1][-1].dtype:
                self._buckets.append([])
                room = _BUCKET_ELEMENTS
            self._buckets[-1].append(parameter)
            room -= parameter.numel()
            parameter.register_post_accumulate_grad_hook(partial(self._complete, len(self._buckets) - 1))
        self._missing: list[int] = []  # gradients, by bucket; [] outside `during`
        self._sent: list[tuple[Tensor, Any]] = []  # sums on their way

    @contextmanager
    def during(self) -> Iterator[None]:
        """Around the backward pass that completes the gradients; all buckets are on their way at its end."""
        self._missing = [len(bucket) for bucket in self._buckets]
        try:
            yield
            while len(self._sent) < len(self._buckets):
                self._send()
        finally:
            self._missing = []

    @torch.no_grad()
    def wait(self) -> None:
        """All gradients are means afterwards."""
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            parts = flat.div_(dist.get_world_size()).split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                assert parameter.grad is not None
                parameter.grad.copy_(part.view_as(parameter.grad))
        self._sent.clear()

    def _complete(self, index: int, _: Tensor) -> None:
        if not self._missing:
            return
        self._missing[index] -= 1
        assert index >= len(self._sent), "a gradient changed after it was sent"
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] == 0:
            self._send()

    @torch.no_grad()
    def _send(self) -> None:
        """The next bucket."""
        bucket = self._buckets[len(self._sent)]
        for parameter in bucket:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        flat = torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None])
        self._sent.append((flat, dist.all_reduce(flat, async_op=True)))


def train_only(network: nn.Module, parts: Sequence[str], option: str) -> None:
    """Freeze all parameters outside of `parts`, such as decoder or decoder.conv_out, and codes that move by hand.

    InputError for a part that is none, with the names there are.
    """

    def inside(name: str, part: str) -> bool:
        return f"{name}.".startswith(f"{part}.")

    given = dict(network.named_parameters())
    for part in parts or [""]:
        if not any(inside(name, part) for name in given):
            known = sorted({".".join(name.split(".")[:depth]) for name in given for depth in (1, 2)})
            raise InputError(
                f"{option}={list(parts)} names no parameter; there are {', '.join(known)}, and null for all."
            )
    for name, parameter in given.items():
        if not any(inside(name, part) for part in parts):
            parameter.requires_grad_(False)
    for name, module in network.named_modules():
        if getattr(module, "watched", False) and not any(inside(name, part) for part in parts):
            module.watched = False


def _one_by_one_where_mixed(optimizer: Optimizer) -> None:
    """No kernel for many parameters, where some are sharded and others are not."""
    for options in optimizer.param_groups:
        if len(by_layout(options["params"])) > 1:
            options |= dict.fromkeys({"foreach", "fused"} & options.keys(), False)
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # of fused ones


RateSchedule = Callable[[int], float]  # step => factor of the configured learning rate


class OptimizerGroups(Validated):
    """Optimizers by the name of a group of parameters, the main group first."""

    updating: bool  # in the middle of an update; else the rates are those of the latest one

    def __init__(
        self,
        seed: int,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],  # one for all groups, or one each
        lr_schedule: RateSchedule,
    ) -> None:
        super().__init__(seed)
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self._groups: dict[str, list[nn.Parameter]] = {}  # by group, from the moment optimizers are made
        self._waiting: dict[str, Any] | None = None  # optimizer states of a checkpoint

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group, the main one first; each parameter belongs to exactly one."""
        raise NotImplementedError

    def active(self, group: str) -> bool:
        """Whether the group is updated at this step."""
        return True

    @contextmanager
    def _only(self, group: str) -> Iterator[None]:
        """Inside, only this group's parameters require gradients."""
        others = [p for name, parameters in self._groups.items() if name != group for p in parameters]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        """One optimizer a group, each with its schedule of the learning rate."""
        self._groups = self.groups()
        owned = [id(p) for parameters in self._groups.values() for p in parameters]
        assert len(owned) == len(set(owned)), "a parameter belongs to two groups"
        stray = [name for name, p in self.named_parameters() if p.requires_grad and id(p) not in set(owned)]
        assert not stray, f"trainable parameters without an optimizer: {stray[:5]}"
        self._optimizers = {group: self._joined(group) for group in self._groups}
        self._rates = {
            group: RateBySteps(optimizer, lambda: self.lr_schedule(max(self.step - (not self.updating), 0)))
            for group, optimizer in self._optimizers.items()
        }
        return list(self._optimizers.values()), [{"scheduler": r, "interval": "step"} for r in self._rates.values()]

    def factory(self, group: str) -> OptimizerFactory:
        """What makes the group's optimizer: its own entry, or the one for all."""
        if not isinstance(self.optimizer, Mapping):
            return self.optimizer
        if group not in self.optimizer:
            known = ", ".join(self.optimizer)
            raise InputError(f"optimizer has entries for {known} but none for {group}; add one or give a single one.")
        return self.optimizer[group]

    def parts(self, group: str, parameters: list[nn.Parameter]) -> list[Part]:
        """What makes the group's optimizers, mostly one, and the parameters of each."""
        factory = self.factory(group)
        if isinstance(factory, MuonAdamW):
            return factory.parts(parameters, hidden_matrices(self), group)
        return [(factory, parameters)]

    def _joined(self, group: str) -> Optimizer:
        made = [make(own) for make, own in self.parts(group, self._groups[group])]
        for optimizer in made:
            _one_by_one_where_mixed(optimizer)
        return made[0] if len(made) == 1 else Joined(made)

    def optimizers_by_group(self) -> dict[str, Optimizer]:
        """The optimizers under the names of their groups."""
        return self._optimizers

    def rates(self) -> dict[str, float]:
        """The learning rate of each group's latest update."""
        return {group: o.param_groups[0]["lr"] for group, o in self.optimizers_by_group().items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Optimizer states wait for the optimizers."""
        self._waiting = checkpoint["optimizers"]

    def on_fit_start(self) -> None:
        """The weights are on their device and the optimizers exist."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            for name, optimizer in self.optimizers_by_group().items():
                restore_optimizer(optimizer, waiting.get(name), name)
