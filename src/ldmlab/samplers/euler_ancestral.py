"""Euler steps down to less noise than asked, and fresh noise on top, for any pair of alpha and sigma."""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level
from ldmlab.errors import InputError
from ldmlab.samplers.ddim import posterior_variance
from ldmlab.samplers.euler import first_order


class EulerAncestral:
    """eta 1: the posterior's variance, as DDPM draws; eta 0: Euler."""

    order = None  # draws noise: no path of which an order could be told
    spacing = "log_snr"
    steps = 50  # where nobody says how many

    def __init__(self, eta: float = 1.0) -> None:
        if not 0 <= eta <= 1:
            raise InputError(f"eta={eta} is not within 0 .. 1; 0 draws no noise in sampling, 1 as much as DDPM.")
        self.eta = eta

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
            fresh = self.eta * math.sqrt(posterior_variance(here, there))  # sigma_up
            down = math.sqrt(there.sigma**2 - fresh**2)  # sigma_down
            x = first_order(x, clean, here, there._replace(sigma=down))
            if fresh > 0:
                x = x + fresh * noise(step)
            if after_step is not None:
                x = after_step(step, x, clean)
        return x
