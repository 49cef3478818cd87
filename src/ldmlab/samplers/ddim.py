"""DDIM (Song et al. 2021, "Denoising diffusion implicit models"), for any pair of alpha and sigma."""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level
from ldmlab.errors import InputError
from ldmlab.samplers.euler import first_order


class Ddim:
    """eta 0: deterministic; eta 1: as much fresh noise per step as ancestral sampling."""

    spacing = "official"  # the step rule this sampler is used with in the paper
    steps = 50  # where nobody says how many

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"eta={eta} is not within 0 .. 1; 0 draws no noise in sampling, 1 as much as DDPM.")
        self.eta = eta
        self.order = None if eta > 0 else 1  # where noise is drawn there is no path of which an order could be told

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
        for step, (here, there) in enumerate(pairwise(grid)):
            clean = denoise(x, here)
            fresh = self.eta * math.sqrt(posterior_variance(here, there))  # eq. 16
            kept = math.sqrt(there.sigma**2 - fresh**2)
            if here.alpha == 0:
                x = first_order(x, clean.to(x.dtype), here, there._replace(sigma=kept))
            else:
                x = transfer(x, noise_of(x, clean, here), here, there._replace(sigma=kept))
            if fresh > 0:
                x = x + fresh * noise(step)
            if after_step is not None:
                x = after_step(step, x, clean.to(x.dtype))
        return x


def noise_of(x: Tensor, clean: Tensor, level: Level) -> Tensor:
    """eps = (x - alpha clean) / sigma: exactly a float32 network's, where `clean` has kept its digits in float64."""
    return ((x.double() - level.alpha * clean.double()) / level.sigma).to(x.dtype)


def transfer(x: Tensor, eps: Tensor, here: Level, there: Level) -> Tensor:
    """alpha' (x - sigma eps) / alpha + sigma' eps (eq. 12), rounded in the order of the paper's code."""
    alpha, next_alpha, kept = (_root(v**2, x.dtype) for v in (here.alpha, there.alpha, there.sigma))
    return next_alpha * ((x - here.sigma * eps) / alpha) + kept * eps


def _root(square: float, dtype: torch.dtype) -> float:
    """The square root as torch rounds it, which in float32 is not always the nearest number."""
    return float(torch.tensor(square, dtype=dtype).sqrt())


def posterior_variance(here: Level, there: Level) -> float:
    """Variance of x at `there`, given x at the noisier `here` and the clean latent: (sigma'/sigma)^2 sigma_step^2."""
    step_variance = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
    return max(there.sigma**2 / here.sigma**2 * step_variance, 0.0)
