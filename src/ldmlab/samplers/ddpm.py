"""Ancestral sampling (Ho et al. 2020, "Denoising diffusion probabilistic models", algorithm 2), any levels."""

import copy
import math
from typing import Self

import torch
from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, checked_temperature


class Ddpm(Stepwise):
    """Draws every step from q(x_s | x_t, clean estimate); the variance is the posterior's, or a network's."""

    order = None
    spacing = "linspace"  # all levels when steps is the schedule's length
    steps = None
    repeats = True
    _learned: list[Tensor] | None = None  # v of the last evaluation, of a network that learned it

    def __init__(self, temperature: float = 1.0, quantize_x0: bool = False) -> None:
        """temperature: factor of the noise; quantize_x0: clean estimates to the nearest codebook vectors."""
        self.temperature, self.quantize_x0 = checked_temperature(temperature), quantize_x0

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """A draw from the posterior of eq. 6 and 7; its mean alone where the variance is 0."""
        here, there = step.here, step.there
        ratio = here.alpha / there.alpha
        step_variance = here.sigma**2 - ratio**2 * there.sigma**2  # of q(x_t | x_s); beta_t for neighbours
        from_x = ratio * there.sigma**2 / here.sigma**2  # eq. 7
        from_clean = there.alpha * step_variance / here.sigma**2
        x = from_x * x + from_clean * step.nearest(clean)
        variance = step_variance * there.sigma**2 / here.sigma**2
        if variance > 0 and self._learned is not None:  # Nichol & Dhariwal 2021, eq. 15
            low, high = math.log(variance), math.log(step_variance)
            return x + torch.exp(0.25 * ((high + low) + (high - low) * self._learned[-1])) * step.noise(step.number)
        return x + math.sqrt(variance) * step.noise(step.number) if variance > 0 else x

    def with_variance(self, learned: list[Tensor]) -> Self:
        """The same sampler; `learned` holds the network's v of its last evaluation, in about -1 .. 1."""
        other = copy.copy(self)
        other._learned = learned
        return other
