"""DDIM (Song et al. 2021, "Denoising diffusion implicit models"), for any pair of alpha and sigma."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.samplers._stepwise import (
    Step,
    Stepwise,
    checked_eta,
    checked_temperature,
    first_order,
    noise_of,
    posterior_variance,
)

_FAINT = 1e-3  # signal, below which a clean estimate from the rounded noise would lose its digits


class Ddim(Stepwise):
    """eta 0: deterministic; eta 1: as much fresh noise per step as ancestral sampling."""

    steps = 50
    repeats = True

    def __init__(
        self,
        eta: float = 0.0,
        spacing: str = "official",  # the default step rule; official is the paper's
        temperature: float = 1.0,  # factor of the fresh noise
        quantize_x0: bool = False,  # clean estimates to the nearest codebook vectors, for VQ first stages
    ) -> None:
        self.eta, self.spacing = checked_eta(eta), spacing
        self.temperature, self.quantize_x0 = checked_temperature(temperature), quantize_x0
        self.order = None if eta > 0 else 1

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' clean + sqrt(sigma'^2 - fresh^2) eps + fresh noise (eq. 12)."""
        here, there = step.here, step.there
        fresh = self.eta * math.sqrt(posterior_variance(here, there)) if self.eta else 0.0  # eq. 16
        quieter = there._replace(sigma=math.sqrt(there.sigma**2 - fresh**2))
        if here.alpha < _FAINT:
            x = first_order(x, step.nearest(clean), here, quieter)
        else:
            x = transfer(x, noise_of(x, step.unrounded, here), here, quieter, step.nearest)
        return x + fresh * step.noise(step.number) if fresh > 0 else x


def transfer(x: Tensor, eps: Tensor, here: Level, there: Level, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """alpha' nearest((x - sigma eps) / alpha) + sigma' eps (eq. 12), rounded in the order of the paper's code."""
    squares = torch.tensor([v**2 for v in (here.alpha, there.alpha, there.sigma)], dtype=x.dtype)
    alpha, next_alpha, kept = squares.sqrt().tolist()  # as torch rounds it, in float32 not always the nearest number
    return next_alpha * nearest((x - here.sigma * eps) / alpha) + kept * eps
