"""Settings of training that do not depend on the stage."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from ldmlab.errors import InputError


@dataclass(frozen=True)
class TrainerSettings:
    """The choices of conf/trainer; steps are optimizer updates of the main network."""

    max_steps: int  # where training ends
    micro_batch: int  # images a process takes at a time
    accumulate: int = 1  # micro-batches a step
    gradient_clip: float | None = None  # largest norm of the gradient
    averaging_decay: float | None = 0.9999  # of the averaged weights; None: none
    precision: Literal["auto", "bf16-mixed", "32-true"] = "bf16-mixed"  # auto becomes what the processor computes fast
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int | None = None  # processes on this machine; None: as many as torchrun or srun started
    compile: bool = False  # torch.compile the main network
    log_every: int = 50  # steps between two rows of metrics.csv
    validate_every: int = 1000  # steps between two evaluations on validation images
    checkpoint_every: int = 1000  # steps between two checkpoints
    keep: int = 2  # newest checkpoints to keep; the best one is kept too

    def __post_init__(self) -> None:
        counts = ("max_steps", "micro_batch", "accumulate", "log_every", "validate_every", "checkpoint_every", "keep")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"trainer.{name}={value} must be a whole number of at least 1.")
            if value < 1:
                raise InputError(f"trainer.{name}={value} must be at least 1.")
        self._one_of("precision", ("auto", "bf16-mixed", "32-true"))
        self._one_of("accelerator", ("auto", "cpu", "gpu"))
        if self.precision == "auto":
            object.__setattr__(self, "precision", fast_precision(self.accelerator))
        for name in ("gradient_clip", "averaging_decay"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise InputError(f"trainer.{name}={value} must be a finite number, or null for none.")
        if self.gradient_clip is not None and self.gradient_clip <= 0:
            raise InputError(f"trainer.gradient_clip={self.gradient_clip} must be above 0, or null for no clipping.")
        if self.averaging_decay is not None and not 0 <= self.averaging_decay < 1:
            raise InputError(f"trainer.averaging_decay={self.averaging_decay} must lie in [0, 1), or null for none.")

    def _one_of(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise InputError(f"trainer.{name}={getattr(self, name)} is unknown; choose {' or '.join(choices)}.")


def fast_precision(accelerator: str) -> Literal["bf16-mixed", "32-true"]:
    """bf16-mixed where the GPU or the processor has instructions for bfloat16, 32-true where it would emulate them.

    A processor without them trains about ten times slower in bf16-mixed than in 32-true.
    """
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16-mixed" if native else "32-true"
