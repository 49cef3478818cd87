"""Validation of a stage by the Trainer, and evaluation of its averaged weights at any other moment."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.averaging import AveragedWeights
from ldmlab.training.random_state import isolated_random
from ldmlab.training.step_metrics import Logged

_SHOWN = 6  # metrics in a sentence


class Validated(Logged):
    """Hooks of validation; `on_validation_epoch_start`, `validation_step` and `validation_metrics` are a subclass's."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.average: AveragedWeights | None = None  # made by callbacks.weight_averaging
        self.validated: dict[str, float] = {}  # metrics of the latest validation
        self.validated_at = 0  # its step
        self._evaluation = ExitStack()

    def validation_metrics(self) -> dict[str, float]:
        """Metrics over all processes of the batches since `on_validation_epoch_start`; {} without any image."""
        raise NotImplementedError

    def on_validation_start(self) -> None:
        """Averaged weights, evaluation mode and random numbers of its own until the epoch of validation ends."""
        self._evaluation.enter_context(self.evaluating())

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Adds a batch of this process to the metrics; one of which no image could be read has none."""
        raise NotImplementedError

    def on_validation_epoch_end(self) -> None:
        """Log the metrics as val/NAME; raw weights come back before any checkpoint can be saved."""
        self.validated, self.validated_at = self.validation_metrics(), self.step
        self.leave_evaluation()
        if not self.trainer.sanity_checking:
            self.log_dict({f"val/{name}": value for name, value in self.validated.items()})

    def leave_evaluation(self) -> None:
        """Undo `on_validation_start`."""
        self._evaluation.close()

    def validate(self, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
        """Metrics over batches (this process's slice), without a Trainer."""
        self.on_validation_epoch_start()
        for index, batch in enumerate(batches):
            self.validation_step(batch, index)
        return self.validation_metrics()

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


def validation_line(values: Mapping[str, float], step: int) -> str:
    """The end of a sentence with the first few metrics of a validation; empty without any."""
    shown = [f"{name} {value:.4g}" for name, value in values.items() if "/" not in name]
    return f"; validation at step {step}: {', '.join(shown[:_SHOWN])}" if shown else ""
