"""The loop over a grid of levels that all samplers share, and formulas that several of them use."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level, Noise
from ldmlab.errors import InputError


@dataclass(frozen=True)
class Step:
    """One step from a level to the next, in addition to x and its clean estimate."""

    number: int
    here: Level  # where x is
    there: Level  # where it goes to
    unrounded: Tensor  # the clean estimate before it was rounded to x's dtype
    denoise: Denoise  # for samplers that evaluate the network twice a step
    noise: Noise
    past: list[Any]  # what a sampler keeps from step to step, empty at first
    nearest: Callable[[Tensor], Tensor]  # of a clean estimate: its codebook vectors with `quantize_x0`, else itself


class Stepwise(ABC):
    """Evaluates the clean estimate and steps to the next level, down the grid; stateless between calls."""

    order: int | None  # of the error in the length of a step; None: it draws noise
    spacing: str  # default rule of diffusion/schedule.py
    steps: int | None  # default number; None: all levels of the schedule
    temperature: float = 1.0  # factor of the noise that steps add
    quantize_x0: bool = False  # replace each clean estimate by the nearest codebook vectors of a VQ first stage
    repeats: bool = False  # take the step between equal levels, which grids of the paper's code may hold
    _nearest: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """x (B, C, h, w) and its clean estimate at `step.here`, both of x's dtype => x at `step.there`."""

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor:
        """x (B, C, h, w) at the first level of the grid => at its last."""
        past: list[Any] = []
        nearest = self._nearest if self.quantize_x0 else lambda clean: clean
        if nearest is None:
            raise InputError("sampler.quantize_x0=true needs a first stage with a codebook; leave it out.")

        def fresh(step: int) -> Tensor:
            return self.temperature * noise(step) if self.temperature != 1 else noise(step)

        for number, (here, there) in enumerate(pairwise(grid)):
            if here[:2] == there[:2] and not self.repeats:
                continue
            unrounded = denoise(x, here)
            clean = unrounded.to(x.dtype)
            x = self.step(x, clean, Step(number, here, there, unrounded, denoise, fresh, past, nearest))
            if after_step is not None:
                x = after_step(number, x, clean)
        return x

    def with_codebook(self, nearest: Callable[[Tensor], Tensor]) -> Self:
        """The same sampler for `quantize_x0`; `nearest`: clean latents (B, C, h, w) => those of their codes."""
        other = copy.copy(self)
        other._nearest = nearest
        return other


def checked_temperature(temperature: float) -> float:
    """The factor of the noise that steps add."""
    if not (0 <= temperature < math.inf):
        raise InputError(f"temperature={temperature} is not a finite number of 0 or more; 1 leaves the noise as it is.")
    return temperature


def checked_eta(eta: float) -> float:
    """Fraction of a step's noise that is new random noise."""
    if not 0 <= eta <= 1:
        raise InputError(f"eta={eta} is not within 0 .. 1; 0 draws no noise in sampling, 1 as much as DDPM.")
    return eta


def first_order(x: Tensor, clean: Tensor, here: Level, there: Level) -> Tensor:
    """alpha' clean + sigma' eps with eps = (x - alpha clean) / sigma put in; alpha = 0 and sigma' = 0 are allowed."""
    kept = there.sigma / here.sigma
    return kept * x + (there.alpha - kept * here.alpha) * clean


def noise_of(x: Tensor, clean: Tensor, level: Level) -> Tensor:
    """eps = (x - alpha clean) / sigma: exactly a float32 network's, where `clean` has kept its digits in float64."""
    return ((x - level.alpha * clean.double()) / level.sigma).to(x.dtype)


def posterior_variance(here: Level, there: Level) -> float:
    """Variance of x at `there`, given x at the noisier `here` and the clean latent: (sigma'/sigma)^2 sigma_step^2."""
    step_variance = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
    return max(there.sigma**2 / here.sigma**2 * step_variance, 0.0)


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma), the papers' half log-SNR; -inf without signal, inf without noise."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf
