"""Ancestral sampling (Ho et al. 2020, "Denoising diffusion probabilistic models", algorithm 2), any levels."""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level


class Ddpm:
    """Draws every step from q(x_s | x_t, clean estimate), the variance of which is the posterior's."""

    order = None  # draws noise: no path of which an order could be told
    spacing = "linspace"  # all levels when steps is the schedule's length
    steps = None  # where nobody says how many: all levels

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
            clean = denoise(x, here).to(x.dtype)
            ratio = here.alpha / there.alpha
            step_variance = here.sigma**2 - ratio**2 * there.sigma**2  # of q(x_t | x_s); beta_t for neighbours
            from_x = ratio * there.sigma**2 / here.sigma**2  # eq. 7
            from_clean = there.alpha * step_variance / here.sigma**2
            x = from_x * x + from_clean * clean
            variance = step_variance * there.sigma**2 / here.sigma**2
            if variance > 0:
                x = x + math.sqrt(variance) * noise(step)
            if after_step is not None:
                x = after_step(step, x, clean)
        return x
