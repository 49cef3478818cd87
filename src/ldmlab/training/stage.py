"""What every trained stage shares: one step is one optimizer update of the main player, and everything counts steps.

Lightning is the engine (devices, precision, processes); order, counters, averaging and checkpoints are ours. Each
micro-batch goes to every active player in turn; the update follows the last micro-batch of the step.
"""

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
from ldmlab.errors import InputError
from ldmlab.training.players import (
    OptimizerFactory,
    alone,
    check_owned,
    clip_gradients,
    factory_of,
    made_optimizers,
    set_rate,
    still_frozen,
)
from ldmlab.training.random_state import isolated_random
from ldmlab.training.terms import Terms

Batch = dict[str, Any]
RateSchedule = Callable[[int], float]  # step => factor of the configured learning rate


@dataclass
class Losses:
    """What a player wants to have smaller for one micro-batch."""

    total: Tensor  # scalar, mean over the micro-batch
    terms: dict[str, Tensor] = field(default_factory=dict)  # scalars to log; each must stay finite
    extras: dict[str, Tensor] = field(default_factory=dict)  # per image, for callbacks


class Stage(pl.LightningModule):
    """The base of all trained stages; a subclass says who plays, what the losses are and what is saved."""

    kind: ClassVar[str]  # name of the stage in checkpoints
    averaged: ClassVar[str | None] = None  # the entry of `saved()` that is averaged
    monitor: str  # the held-out number that decides which checkpoint is best
    monitor_mode: Literal["min", "max"] = "min"

    def __init__(
        self,
        *,
        seed: int,
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory],  # one for all players, or one each
        lr_schedule: RateSchedule,
        max_steps: int,
        accumulate: int = 1,  # micro-batches a step
        gradient_clip: float | None = None,  # largest norm of a player's gradient
        averaging_decay: float | None = None,  # None: no averaged weights
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.seed, self.max_steps, self.accumulate = seed, max_steps, accumulate
        self.optimizer, self.lr_schedule = optimizer, lr_schedule
        self.gradient_clip, self.averaging_decay = gradient_clip, averaging_decay
        self.step = 0  # updates of the main player
        self.position = 0  # images consumed over all processes
        self.average: AveragedWeights | None = None  # made once the weights are on their device
        self.extras: dict[str, dict[str, Tensor]] = {}  # by player, of the latest micro-batch
        self.at_border = True  # between two steps
        self.terms = Terms()
        self._parameters_of: dict[str, list[nn.Parameter]] = {}  # by player, from the moment optimizers are made
        self.updating = False  # in the middle of an update, where no state may be saved
        self._micro_batches = 0
        self._waiting: dict[str, Any] | None = None  # checkpoint parts that need the optimizers

    # -- what a subclass defines -------------------------------------------------------------------------------------

    def players(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by player, the main one first; each parameter belongs to exactly one."""
        raise NotImplementedError

    def active(self, player: str) -> bool:
        """Whether the player is updated at this step."""
        return True

    def losses(self, player: str, batch: Batch) -> Losses:
        """The player's loss for a micro-batch; only its own parameters require gradients meanwhile."""
        raise NotImplementedError

    def saved(self) -> dict[str, nn.Module]:
        """The modules that a checkpoint holds, by name."""
        raise NotImplementedError

    def held_out(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Numbers over held-out batches (this process's share), called with averaged weights in evaluation mode."""
        raise NotImplementedError

    def panels(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Images to look at by name, uint8 (N, H, W, 3), called like `held_out` on the first process only."""
        return {}

    # -- one step ----------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_index: int) -> None:
        """One micro-batch; after the last one of a step all active players are updated."""
        self.at_border = False
        last = self._micro_batches + 1 == self.accumulate
        playing = {name: parameters for name, parameters in self._parameters_of.items() if self.active(name)}
        for player in playing:
            self._backward(player, batch, last)
        self._micro_batches += 1
        self._images = len(batch["position"])
        if last:
            self._update(playing)

    def _backward(self, player: str, batch: Batch, last: bool) -> None:
        with self._only(player), nullcontext() if last else self._no_sync():
            losses = self.losses(player, batch)
            self.manual_backward(losses.total / self.accumulate)
        self.extras[player] = {name: value.detach() for name, value in losses.extras.items()}
        for name, value in (losses.terms or {"loss": losses.total}).items():
            self.terms.add(name, value, 1 / self.accumulate)

    def _only(self, player: str) -> AbstractContextManager[None]:
        """Inside, only this player's parameters require gradients."""
        return alone(self._parameters_of, player)

    def _no_sync(self) -> AbstractContextManager[Any]:
        """Gradients stay with their process inside, for all micro-batches of a step but the last."""
        wrapped = getattr(self.trainer.strategy, "model", None)
        return wrapped.no_sync() if isinstance(wrapped, nn.parallel.DistributedDataParallel) else nullcontext()

    def _update(self, playing: dict[str, list[nn.Parameter]]) -> None:
        self.updating = True
        optimizers = self.optimizers_by_player()
        wrapped = isinstance(self.trainer.strategy.model, nn.parallel.DistributedDataParallel)
        for player, parameters in playing.items():
            if not wrapped:
                distributed.mean_gradients(parameters)
            self.terms.add(f"gradient_norm/{player}", clip_gradients(parameters, self.gradient_clip))
            set_rate(optimizers[player], self.lr_schedule(self.step))
            optimizers[player].step()
            optimizers[player].zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self.step += 1
        self.position += self._images * self.accumulate * distributed.world_size()
        self.terms.close(self.step)
        self._micro_batches, self.at_border, self.updating = 0, True, False

    # -- optimizers --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[Optimizer]:
        """One optimizer a player; `initial_lr` keeps the configured rate."""
        self._parameters_of = self.players()
        check_owned(self, self._parameters_of)
        self._optimizers = made_optimizers(self._parameters_of, self.factory)
        return list(self._optimizers.values())

    def factory(self, player: str) -> OptimizerFactory:
        """What makes the player's optimizer."""
        return factory_of(self.optimizer, player)

    def optimizers_by_player(self) -> dict[str, Optimizer]:
        """The optimizers under the names of their players."""
        return self._optimizers

    def rates(self) -> dict[str, float]:
        """The learning rate of each player's latest update."""
        return {player: o.param_groups[0]["lr"] for player, o in self.optimizers_by_player().items()}

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
        for player, state in waiting["optimizers"].items():
            self.optimizers_by_player()[player].load_state_dict(state)
        if self.average is not None and self.averaged in waiting["averaged"]:
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
            "terms": self.terms.checked,
            "optimizers": {name: o.state_dict() for name, o in self.optimizers_by_player().items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`: weights and counters at once, optimizers and averages when fitting starts."""
        if state["kind"] != self.kind:
            raise InputError(
                f"the checkpoint is of stage={state['kind']}, this run is stage={self.kind}; resume its own run."
            )
        for name, module in self.saved().items():
            module.load_state_dict(state["modules"][name])
        self.step, self.position, self._waiting = state["step"], state["position"], state
        self.terms.checked = state["terms"]
