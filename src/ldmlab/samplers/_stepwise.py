"""The walk down a grid that all samplers share, and formulas that several of them use; a sampler adds its step."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level
from ldmlab.errors import InputError


@dataclass(frozen=True)
class Step:
    """One step of a walk, beside x and its clean estimate."""

    number: int
    here: Level  # where x is
    there: Level  # where it goes
    unrounded: Tensor  # the clean estimate as the network's translation gave it: x's dtype or a wider one
    denoise: Denoise  # for samplers that ask again within the step
    noise: Callable[[int], Tensor]  # of a step, in x's shape
    past: list[Any]  # of this walk, empty at first: what a sampler keeps from step to step


class Stepwise(ABC):
    """A sampler that asks for a clean estimate, steps to the next level, and so on; it keeps nothing after a walk."""

    order: int | None  # of the error in the length of a step; None: it draws noise, so there is no path to err from
    spacing: str  # a rule of diffusion/grid.py, where nobody names one
    steps: int | None  # where nobody says how many; None: all levels of the schedule

    @abstractmethod
    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """x (B, C, h, w) and its clean estimate at `step.here`, both of x's dtype => x at `step.there`."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,  # (B, C, h, w) at grid[0]
        grid: list[Level],
        *,
        noise: Callable[[int], Tensor],
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """x at the last level of the grid."""
        past: list[Any] = []
        for number, (here, there) in enumerate(pairwise(grid)):
            unrounded = denoise(x, here)
            clean = unrounded.to(x.dtype)
            x = self.step(x, clean, Step(number, here, there, unrounded, denoise, noise, past))
            if after_step is not None:
                x = after_step(number, x, clean)
        return x


def checked_eta(eta: float) -> float:
    """The share of a step's noise that is drawn afresh."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta} is not within 0 .. 1; 0 draws no noise in sampling, 1 as much as DDPM.")
    return eta


def first_order(x: Tensor, clean: Tensor, here: Level, there: Level) -> Tensor:
    """alpha' clean + sigma' eps with eps = (x - alpha clean) / sigma put in; alpha = 0 and sigma' = 0 are allowed."""
    kept = there.sigma / here.sigma
    return kept * x + (there.alpha - kept * here.alpha) * clean


def noise_of(x: Tensor, clean: Tensor, level: Level) -> Tensor:
    """eps = (x - alpha clean) / sigma: exactly a float32 network's, where `clean` has kept its digits in float64."""
    return ((x.double() - level.alpha * clean.double()) / level.sigma).to(x.dtype)


def posterior_variance(here: Level, there: Level) -> float:
    """Variance of x at `there`, given x at the noisier `here` and the clean latent: (sigma'/sigma)^2 sigma_step^2."""
    step_variance = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
    return max(there.sigma**2 / here.sigma**2 * step_variance, 0.0)


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma), the papers' half log-SNR; -inf without signal, inf without noise."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf
