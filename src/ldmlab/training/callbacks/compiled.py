"""Compilation of a stage's networks."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch

from ldmlab.errors import InputError
from ldmlab.nn.compiling import TrainingChoice, compile_regions, seconds, wanted


def check_graphs(choice: TrainingChoice, stage: Any) -> None:
    """InputError where passes of a stage cannot be replayed, since its weights move or parts of them run twice."""
    if choice == "cuda_graphs" and (stage.sharded or len(stage.groups()) > 1):
        why = "trainer.strategy shards the weights" if stage.sharded else "an adversary runs parts of a pass twice"
        raise InputError(f"trainer.compile=cuda_graphs: {why}; use trainer.compile=true.")


class Compiled(pl.Callback):
    """Compiles all networks of the stage, region by region, and prints what the first step has cost."""

    def __init__(self, choice: TrainingChoice, say: Callable[[str], None]) -> None:
        self.choice, self.say, self.count = choice, say, 0
        self.replayed = choice == "cuda_graphs"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The weights are on their device."""
        if not wanted(self.choice, pl_module.device):
            return
        self.count = compile_regions(pl_module, cuda_graphs=self.replayed)
        if not self.count:
            self.say("trainer.compile: no network here declares a region, so nothing is compiled (docs/extending.md).")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Marks where a step begins: what recorded passes gave, gradients of micro-batches too, is kept until then."""
        if self.replayed and pl_module.step_complete:
            torch.compiler.cudagraph_mark_step_begin()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """After the first step; later ones compile only what comes later, such as validation."""
        if self.count and pl_module.step_complete:
            self.say(f"compiled {self.count} blocks in {seconds():.1f} s of the first step")
            self.count = 0
