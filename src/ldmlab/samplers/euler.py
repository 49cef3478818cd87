"""Euler's method on the probability flow (Karras et al. 2022, "Elucidating the design space", section 3)."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level


class Euler:
    """One evaluation a step; DDIM without noise, on steps that are its own."""

    order = 1
    spacing = "log_snr"
    steps = 50  # where nobody says how many

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
            x = first_order(x, clean, here, there)
            if after_step is not None:
                x = after_step(step, x, clean)
        return x


def first_order(x: Tensor, clean: Tensor, here: Level, there: Level) -> Tensor:
    """alpha' clean + sigma' eps with eps = (x - alpha clean) / sigma put in; alpha = 0 and sigma' = 0 are allowed."""
    kept = there.sigma / here.sigma
    return kept * x + (there.alpha - kept * here.alpha) * clean
