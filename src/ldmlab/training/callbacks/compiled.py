"""Compilation of a stage's networks."""

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from ldmlab.nn.compiling import Choice, compile_regions, seconds, wanted


class Compiled(pl.Callback):
    """Compiles all networks of the stage, region by region, and prints what the first step has cost."""

    def __init__(self, choice: Choice, say: Callable[[str], None]) -> None:
        self.choice, self.say, self.count = choice, say, 0

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The weights are on their device."""
        if not wanted(self.choice, pl_module.device):
            return
        self.count = compile_regions(pl_module)
        if not self.count:
            self.say("trainer.compile: no network here declares a region, so nothing is compiled (docs/extending.md).")

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """After the first step; later ones compile only what comes later, such as validation."""
        if self.count and pl_module.step_complete:
            self.say(f"compiled {self.count} blocks in {seconds():.1f} s of the first step")
            self.count = 0
