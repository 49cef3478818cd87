"""Heun's method on the probability flow (Karras et al. 2022, "Elucidating the design space", algorithm 1)."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level
from ldmlab.samplers.ddim import noise_of
from ldmlab.samplers.euler import first_order


class Heun:
    """Two evaluations a step, at its start and at its end; one where the network cannot be asked at the end."""

    order = 2
    spacing = "log_snr"
    steps = 25  # where nobody says how many: 49 evaluations

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
            guess = first_order(x, clean, here, there)
            if there.time is None or there.sigma == 0 or here.alpha == 0:
                x = guess
            else:  # d(x / alpha) = eps d(sigma / alpha): the mean of both ends, instead of the first alone
                change = noise_of(guess, denoise(guess, there), there) - noise_of(x, clean, here)
                x = guess + 0.5 * (there.sigma - there.alpha / here.alpha * here.sigma) * change
            if after_step is not None:
                x = after_step(step, x, clean)
        return x
