"""Base of all trained stages: one step is one optimizer update of the main group, and everything counts steps.

Lightning is the engine (devices, precision, processes); order, counters, averaging and checkpoints are ours. Each
micro-batch goes to every active group in turn; the update follows the last micro-batch of the step.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ldmlab import distributed
from ldmlab.averaging import AveragedWeights
from ldmlab.checkpoints import load_exactly
from ldmlab.errors import InputError
from ldmlab.training.optim import (
    OptimizerFactory,
    check_owned,
    clip_gradients,
    factory_of,
    made_optimizers,
    only_trainable,
    restore_optimizer,
    set_rate,
    still_frozen,
)
from ldmlab.training.random_state import isolated_random

Batch = dict[str, Any]
RateSchedule = Callable[[int], float]  # step => factor of the configured learning rate


@dataclass
class Losses:
    """Loss of one optimizer group on one micro-batch."""

    total: Tensor  # scalar, mean over the micro-batch
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalars to log; each must stay finite
    extras: dict[str, Tensor] = field(default_factory=dict)  # per image, for callbacks


class StepMetrics:
    """Named scalars by step; reading them is the only moment when the host waits for the device."""

    def __init__(self) -> None:
        self._row: dict[str, Tensor] = {}  # of the unfinished step
        self._last: dict[str, Tensor] = {}  # of the latest finished one
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # on the device, by step
        self.checked: dict[str, list[float]] = {}  # since the last `read`

    def add(self, name: str, value: Tensor, share: float = 1.0) -> None:
        """A part of the running step's value: micro-batches add 1 / accumulate of theirs."""
        part = value.detach().float() * share
        self._row[name] = self._row[name] + part if name in self._row else part

    def close(self, step: int) -> None:
        """The step is complete."""
        self._unread.append((step, self._row))
        self._last, self._row = self._row, {}

    def latest(self) -> str:
        """The first metric of the latest step, of this process: `loss 0.1234`."""
        return next((f"{name} {float(value):.4f}" for name, value in self._last.items()), "")

    def check(self) -> None:
        """Fetch what has not been seen; InputError names the first metric that is not finite, and its step."""
        if not self._unread:
            return
        stacked = torch.stack([value for _, row in self._unread for value in row.values()])
        values = iter(distributed.mean_(stacked).tolist())
        for step, row in self._unread:
            for name in row:
                value = next(values)
                if not math.isfinite(value):
                    raise InputError(
                        f"{name} became {value} at step {step}; no checkpoint was written since. A lower "
                        "optimizer.learning_rate or trainer.gradient_clip=1 may help; the same command resumes the run."
                    )
                self.checked.setdefault(name, []).append(value)
        self._unread = []

    def read(self) -> dict[str, float]:
        """Mean of every term over the steps since the last call."""
        self.check()
        means = {name: sum(values) / len(values) for name, values in self.checked.items()}
        self.checked = {}
        return means


class Stage(pl.LightningModule):
    """The base of all trained stages; a subclass defines optimizer groups, losses and what is saved."""

    kind: ClassVar[str]  # name of the stage in checkpoints
    averaged: ClassVar[str | None] = None  # the entry of `saved()` that is averaged
    monitor: str  # the validation metric that decides which checkpoint is best
    monitor_mode: Literal["min", "max"] = "min"
    panel_titles: ClassVar[Mapping[str, str]] = {}  # legend of a panel, by its name

    def __init__(
        self,
        *,
        seed: int,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],  # one for all groups, or one each
        lr_schedule: RateSchedule,
        max_steps: int,
        accumulate: int = 1,  # micro-batches a step
        gradient_clip: float | None = None,  # largest norm of a group's gradient
        averaging_decay: float | None = None,  # None: no averaged weights
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seed, self.max_steps, self.accumulate = seed, max_steps, accumulate
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.gradient_clip, self.averaging_decay = gradient_clip, averaging_decay
        self.step = 0  # updates of the main group
        self.position = 0  # images consumed over all processes
        self.average: AveragedWeights | None = None  # made once the weights are on their device
        self.extras: dict[str, dict[str, Tensor]] = {}  # by group, of the latest micro-batch
        self.step_complete = True  # between two steps
        self.metrics = StepMetrics()
        self._groups: dict[str, list[nn.Parameter]] = {}  # by group, from the moment optimizers are made
        self.one_by_one = False  # update each group before the loss of the next one is computed
        self.updating = False  # in the middle of an update, where no state may be saved
        self._micro_batches = 0
        self._waiting: dict[str, Any] | None = None  # checkpoint parts that need the optimizers

    # -- what a subclass defines -------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by group, the main one first; each parameter belongs to exactly one."""
        raise NotImplementedError

    def active(self, group: str) -> bool:
        """Whether the group is updated at this step."""
        return True

    def losses(self, group: str, batch: Batch) -> Losses:
        """The group's loss for a micro-batch; only its own parameters require gradients meanwhile."""
        raise NotImplementedError

    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name."""
        raise NotImplementedError

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Metrics over validation batches (this process's slice), called with averaged weights in evaluation mode."""
        raise NotImplementedError

    def panels(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Images for the grids by name, uint8 (N, H, W, 3), called like `validate` on the first process only."""
        return {}

    def panel_labels(self, batches: Iterable[Batch]) -> dict[str, list[str]]:
        """A label for each image of a panel, by the panel's name: captions, classes."""
        return {}

    # -- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One micro-batch; after the last one of a step all active groups are updated."""
        self.step_complete = False
        last = self._micro_batches + 1 == self.accumulate
        active = {name: parameters for name, parameters in self._groups.items() if self.active(name)}
        for group, parameters in active.items():
            self._backward(group, batch, last)
            if last and self.one_by_one:
                self._update_group(group, parameters)
        self._micro_batches += 1
        self._images = len(batch["position"])
        if last:
            self._update({} if self.one_by_one else active)

    def _backward(self, group: str, batch: Batch, last: bool) -> None:
        with self._only(group), nullcontext() if last else self._no_sync():
            losses = self.losses(group, batch)
            self.manual_backward(losses.total / self.accumulate)
        self.extras[group] = {name: value.detach() for name, value in losses.extras.items()}
        for name, value in (losses.metrics or {"loss": losses.total}).items():
            self.metrics.add(name, value, 1 / self.accumulate)

    def _only(self, group: str) -> AbstractContextManager[None]:
        """Inside, only this group's parameters require gradients."""
        return only_trainable(self._groups, group)

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Inside, gradients are not synchronised, for all micro-batches of a step but the last."""
        wrapped = getattr(self.trainer.strategy, "model", None)
        return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else nullcontext()

    def _update_group(self, group: str, parameters: list[nn.Parameter]) -> None:
        self.updating = True
        optimizer = self.optimizers_by_group()[group]
        if not isinstance(self.trainer.strategy.model, nn.parallel.DistributedDataParallel):
            distributed.mean_gradients(parameters)
        self.metrics.add(f"gradient_norm/{group}", clip_gradients(parameters, self.gradient_clip))
        set_rate(optimizer, self.lr_schedule(self.step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def _update(self, active: dict[str, list[nn.Parameter]]) -> None:
        self.updating = True
        for group, parameters in active.items():
            self._update_group(group, parameters)
        if self.average is not None:
            self.average.update()
        self.step += 1
        self.position += self._images * self.accumulate * distributed.world_size()
        self.metrics.close(self.step)
        self._micro_batches, self.step_complete, self.updating = 0, True, False

    # -- optimizers --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer a group; `initial_lr` keeps the configured rate."""
        self._groups = self.groups()
        check_owned(self, self._groups)
        self._optimizers = made_optimizers(self._groups, self.factory)
        return list(self._optimizers.values())

    def factory(self, group: str) -> OptimizerFactory:
        """What makes the group's optimizer."""
        return factory_of(self.optimizer, group)

    def optimizers_by_group(self) -> dict[str, Optimizer]:
        """The optimizers under the names of their groups."""
        return self._optimizers

    def rates(self) -> dict[str, float]:
        """The learning rate of each group's latest update."""
        return {group: o.param_groups[0]["lr"] for group, o in self.optimizers_by_group().items()}

    # -- looking ---------------------------------------------------------------------------------------------------

    def mean_over_processes(self, sums: dict[str, Tensor | float], count: int | float) -> dict[str, float]:
        """Sums over this process's images and their count => means over the images of all; {} without any."""
        values = torch.tensor([*(float(v) for v in sums.values()), float(count)], dtype=torch.float64)
        *totals, number = distributed.sum_(values).tolist()
        return {name: total / number for name, total in zip(sums, totals, strict=True)} if number else {}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Averaged weights, evaluation mode, no gradients, the run's precision, and no trace in the random state."""
        modes = [(module, module.training) for module in self.modules()]
        averaged = self.average.applied() if self.average is not None else nullcontext()
        precision = self.trainer.precision_plugin.forward_context()
        try:
            with averaged, torch.no_grad(), precision, isolated_random(self.seed):
                self.eval()
                yield
        finally:
            for module, mode in modes:
                module.training = mode

    def train(self, mode: bool = True) -> "Stage":
        """Training mode, but frozen parts (all parameters frozen) stay in evaluation mode."""
        super().train(mode)
        still_frozen(self)
        return self

    # -- state -------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """The weights are on their device and the optimizers exist: make the averages, take up a checkpoint."""
        if self.averaging_decay is not None and self.averaged is not None:
            self.average = AveragedWeights(self.saved()[self.averaged], self.averaging_decay)
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        for name, optimizer in self.optimizers_by_group().items():
            restore_optimizer(optimizer, waiting["optimizers"].get(name), name)
        if self.average is not None:
            if self.averaged not in waiting["averaged"]:
                raise InputError(
                    "the checkpoint holds no averaged weights; continue with trainer.averaging_decay=null."
                )
            self.average.load_state_dict(waiting["averaged"][self.averaged])

    def state(self) -> dict[str, Any]:
        """Everything of the stage that a checkpoint holds, tensors and plain types only."""
        averages = {self.averaged: self.average.state_dict()} if self.average is not None else {}
        return {
            "kind": self.kind,
            "step": self.step,
            "position": self.position,
            "seed": self.seed,
            "modules": {name: module.state_dict() for name, module in self.saved().items()},
            "averaged": averages,
            "metrics": self.metrics.checked,
            "optimizers": {name: o.state_dict() for name, o in self.optimizers_by_group().items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`: weights and counters at once, optimizers and averages when fitting starts."""
        for name, module in self.saved().items():
            if name not in state["modules"]:
                raise InputError(f"the checkpoint of step {state['step']} holds no {name}; resume its own run.")
            load_exactly(module, self.own_weights(name, state["modules"][name]), f"the checkpoint's {name}")
        self.step, self.position, self._waiting = state["step"], state["position"], state
        self.metrics.checked = state["metrics"]

    def own_weights(self, name: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of a checkpoint's module: the tensors that this stage keeps in checkpoints."""
        return tensors
