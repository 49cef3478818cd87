"""Base of all trained stages: one step is one optimizer update of the main group, and everything counts steps.

The Trainer's hooks call it; optimization is manual, since each micro-batch goes to every active group in turn and the
update follows the last micro-batch of the step.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ldmlab import distributed
from ldmlab.checkpoints import check_fit, load_exactly
from ldmlab.errors import InputError
from ldmlab.sharded import by_layout, is_sharded
from ldmlab.training.data_module import Batch
from ldmlab.training.optim import OptimizerFactory
from ldmlab.training.optimizer_groups import MeanGradients, OptimizerGroups, RateSchedule
from ldmlab.training.precision import StepScaler


@dataclass
class Losses:
    """Loss of one optimizer group on one micro-batch."""

    total: Tensor  # scalar, mean over the micro-batch
    metrics: dict[str, Tensor] = field(default_factory=dict)  # scalars to log; each must stay finite
    extras: dict[str, Any] = field(default_factory=dict)  # per image, or what computes it, for callbacks


def _norm(gradients: list[Tensor]) -> Tensor:
    """Of all values together, those of other processes' shards too."""
    norms = [nn.utils.get_total_norm(part) for part in by_layout(gradients)]
    full = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return full[0] if len(full) == 1 else torch.stack(full).norm()


class Stage(OptimizerGroups):
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
        skip_nonfinite: int = 0,  # steps in a row that are left out where a gradient is not finite
        averaging_decay: float | None = None,  # None: no averaged weights
        averaging_warmup: tuple[float, float] | float | None = None,  # as of `AveragedWeights`
        averaging_start: int = 0,  # step until which the average is a copy
    ) -> None:
        super().__init__(seed, optimizer, lr_schedule)
        self.automatic_optimization, self.strict_loading = False, False
        self.max_steps, self.accumulate = max_steps, accumulate
        self.gradient_clip, self.skip_nonfinite = gradient_clip, skip_nonfinite
        self.averaging_decay, self.averaging = averaging_decay, (averaging_warmup, averaging_start)
        self.step = 0  # updates of the main group
        self.position = 0  # images consumed over all processes
        self.sharded = False  # whether the strategy shards the networks when it sets up
        self._weights: dict[str, Any] = {}  # of a checkpoint, which wait for that
        self.extras: dict[str, dict[str, Any]] = {}  # by group, of the latest micro-batch
        self.step_complete = True  # between two steps
        self.unvalidated = False  # whether the run was killed in the validation of the step that it resumes from
        self.panel_labels: dict[str, list[str]] = {}  # of the images of the latest panels, by name
        self._means: dict[str, MeanGradients] = {}  # by group, where no strategy synchronises gradients
        self.one_by_one = False  # update each group before the loss of the next one is computed
        self.updating = False  # in the middle of an update, where no state may be saved
        self._micro_batches = self._images = 0
        self._keys: list[str] = []  # of this step's images
        self._left_out = False  # whether a gradient of this step was not finite

    # -- what a subclass defines, with `groups` and `active` ---------------------------------------------------------

    def losses(self, group: str, batch: Batch) -> Losses:
        """The group's loss for a micro-batch; only its own parameters require gradients meanwhile."""
        raise NotImplementedError

    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name."""
        raise NotImplementedError

    def tokenizers(self) -> dict[str, Any]:
        """What turns captions into token numbers, by name; loaders run it."""
        return {}

    def networks(self) -> list[tuple[nn.Module, tuple[str, ...]]]:
        """All that is trained, each network with its methods besides forward, for FSDP; []: it cannot be sharded.

        `validation_step` then runs them for a batch with `filler` too, and adds nothing to the metrics.
        """
        return []

    def whole(self) -> list[nn.Parameter]:
        """Parameters of `networks` that are used or written outside of their passes, so that FSDP leaves them whole."""
        return []

    def panels(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Images for the grids by name, uint8 (N, H, W, 3), with averaged weights; called by all processes."""
        return {}

    @property
    def phase(self) -> tuple[Any, ...]:
        """What this step's cost depends on: the groups that it updates."""
        return tuple(filter(self.active, self._groups))

    @property
    def _memory_format(self) -> torch.memory_format:
        """Of images and convolutions, frozen ones too: channels-last on a GPU (slower on a CPU, measured)."""
        device = self.device if self._trainer is None else self._trainer.strategy.root_device
        return torch.channels_last if device.type == "cuda" else torch.contiguous_format

    def setup(self, stage: str) -> None:
        """Lay out the weights for the device that they will move to, before the strategy lays out gradients."""
        if self._memory_format == torch.channels_last:
            self.to(memory_format=torch.channels_last)

    def on_train_start(self) -> None:
        """The Trainer's counters follow ours: they count optimizers and batches."""
        epoch = self.trainer.fit_loop.epoch_loop
        epoch.batch_progress.total.ready = self.step * self.accumulate
        epoch._batches_that_stepped = self.step + 1
        epoch.manual_optimization.optim_step_progress.total.completed = self.step  # trainer.global_step
        if distributed.joined() and self._ddp is None:
            whole = {group: [p for p in own if not is_sharded(p)] for group, own in self._groups.items()}
            self._means = {group: MeanGradients(own) for group, own in whole.items() if own}
        if self.unvalidated:
            self.trainer.validating = True
            epoch.val_loop.run()
            self.trainer.training, self.unvalidated = True, False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One micro-batch; after the last one of a step all active groups are updated."""
        self.step_complete = False
        last = self._micro_batches + 1 == self.accumulate
        active = [group for group in self._groups if self.active(group)]
        for group in active:
            self._backward(group, batch, last)
            if last and self.one_by_one:
                self._update_group(group)
        self._micro_batches += 1
        self._keys += batch.get("key") or []
        self._images = len(batch["position"])
        if last:
            self._update([] if self.one_by_one else active)
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.step

    def _backward(self, group: str, batch: Batch, last: bool) -> None:
        with self._only(group), self._synchronised(group, last):
            losses = self.losses(group, batch)
            self.manual_backward(losses.total / self.accumulate if self.accumulate > 1 else losses.total)
        self.extras[group] = {
            name: value.detach() if isinstance(value, Tensor) else value for name, value in losses.extras.items()
        }
        self.metrics.add(losses.metrics or {"loss": losses.total}, 1 / self.accumulate)

    @property
    def _ddp(self) -> nn.parallel.DistributedDataParallel | None:
        """DDP's wrapper, where it synchronises the gradients."""
        wrapped = self.trainer.strategy.model
        return wrapped if isinstance(wrapped, nn.parallel.DistributedDataParallel) else None

    def _synchronised(self, group: str, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward: gradients meet those of other processes in the last micro-batch of a step."""
        if self._ddp is not None:
            return nullcontext() if last else self._ddp.no_sync()
        return self._means[group].during() if last and group in self._means else nullcontext()

    def _update_group(self, group: str) -> None:
        self.updating = True
        if group in self._means:
            self._means[group].wait()
        index = list(self._groups).index(group)
        self._rates[group].step()
        optimizer = self.optimizers(use_pl_optimizer=True)
        chosen = optimizer[index] if isinstance(optimizer, list) else optimizer
        chosen.step()
        increment_version(self._groups[group])  # which no optimizer does for sharded ones; see `MPConv.force_normal`
        chosen.zero_grad(set_to_none=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """The norm of the gradient, without the scale of float16, and its clipping."""
        group = next(name for name, own in self.optimizers_by_group().items() if own is optimizer)
        parameters = self._groups[group]
        if self._scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            self._scaler.unscale_(optimizer)  # Lightning leaves it to fused optimizers, which do it later
        norm = _norm([p.grad for p in parameters if p.grad is not None])
        if self.skip_nonfinite and self._scaler is None and not bool(norm.isfinite()):  # waits for the device
            self._left_out = True
            for parameter in parameters:
                parameter.grad = None  # which leaves weights and the optimizer's state as they are
        for part in by_layout(parameters) if self.gradient_clip is not None else ():
            nn.utils.clip_grads_with_norm_(part, self.gradient_clip, norm)  # type: ignore[arg-type]
        if self._scaler is not None:  # an update whose gradient overflowed is left out
            overflow = ~norm.isfinite()
            self.metrics.add({f"overflow/{group}": overflow})
            norm = norm.masked_fill(overflow, 0.0)
        self.metrics.add({f"gradient_norm/{group}": norm})

    @property
    def _scaler(self) -> Any:
        """Of the losses in 16-mixed, else None."""
        return None if self._trainer is None else getattr(self.trainer.precision_plugin, "scaler", None)

    def _update(self, active: list[str]) -> None:
        self.updating = True
        for group in active:
            self._update_group(group)
        if isinstance(self._scaler, StepScaler):
            self._scaler.end_step()
        self.step += 1
        self.position += self._images * self.accumulate * distributed.world_size()
        if self._left_out:
            self.metrics.leave_out(self.step, self._keys, self.skip_nonfinite)
        else:
            self.metrics.close(self.step, self._keys)
        self._left_out, self._keys = False, []
        self._micro_batches, self.step_complete, self.updating = 0, True, False
        self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total.completed = self.step
        if self.step >= self.max_steps:
            self.trainer.should_stop = True  # after a last validation

    def train(self, mode: bool = True) -> "Stage":
        """Training mode, but frozen parts (all parameters frozen) stay in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            by_hand = getattr(module, "watched", False)  # codes that are running means are trained without gradients
            if parameters and not by_hand and not any(p.requires_grad for p in parameters):
                module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Our names in place of Lightning's: modules without frozen parts, optimizers by group, our counters."""
        for name in ("state_dict", "loops", "optimizer_states", "lr_schedulers", "epoch"):  # all follow from ours
            checkpoint.pop(name, None)
        checkpoint |= {
            "kind": self.kind,
            "step": self.step,
            "position": self.position,
            "seed": self.seed,
            "unvalidated": self.validation_due and self.validated_at != self.step,  # a signal does not wait for it
            "modules": {name: module.state_dict() for name, module in self.saved().items()},
            "optimizers": {name: o.state_dict() for name, o in self.optimizers_by_group().items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Weights and counters of a checkpoint, before the Trainer starts; sharded ones are loaded after sharding."""
        for name, module in self.saved().items():
            if name not in state["modules"]:
                raise InputError(f"the checkpoint of step {state['step']} holds no {name}; resume its own run.")
            take = check_fit if self.sharded else load_exactly
            take(module, state["modules"][name], f"the checkpoint's {name}")
        self.step, self.position = state["step"], state["position"]
        self.unvalidated = state.get("unvalidated", False)
        self.metrics.restore(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the weights until the networks are sharded, and optimizer states until the optimizers exist."""
        super().on_load_checkpoint(checkpoint)
        self._weights = checkpoint["modules"] if self.sharded else {}

    def on_fit_start(self) -> None:
        """The weights are on their device and the optimizers exist."""
        weights, self._weights = self._weights, {}
        for name, module in self.saved().items() if weights else ():
            load_exactly(module, weights[name], f"the checkpoint's {name}")
        super().on_fit_start()
