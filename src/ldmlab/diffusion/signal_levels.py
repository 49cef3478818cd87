"""How much of a latent is left at each time of a schedule or path."""

import math
from typing import Any

import torch
from torch import Tensor

from ldmlab.diffusion.schedule import levels_of


def signal_to_noise(schedule: Any, variance: float) -> Tensor:
    """alpha^2 Var(z) / sigma^2 at every time, (T,) float64; infinite where there is no noise (appendix D.1)."""
    levels = levels_of(schedule)
    return variance * (levels.alpha / levels.sigma).square()


def even_time(schedule: Any, variance: float) -> float | None:
    """The first time at which noise is at least as strong as signal; None if that never happens."""
    if not hasattr(schedule, "steps"):  # a continuous path
        time = schedule.time_of(torch.tensor([variance], dtype=torch.float64).sqrt())
        alpha, sigma = schedule.levels(time)
        return float(time) if float(variance * (alpha / sigma) ** 2) <= 1.001 else None
    weaker = torch.nonzero(signal_to_noise(schedule, variance) <= 1)
    return int(weaker[0]) if len(weaker) else None


def decibels(ratio: float) -> float:
    """10 log10, which is 0 where signal and noise are equally strong."""
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
