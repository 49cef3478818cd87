"""Steps of average velocities (Geng et al. 2025, "Mean flows", eq. 12), x_r = x_t - (t - r) u(x_t, r, t)."""

from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level, Noise
from ldmlab.samplers.euler import Euler


class MeanFlow(Euler):
    """Tells the network where each step goes; on a model without average velocities the same as Euler's method."""

    spacing = "linspace"
    steps = 1

    def __init__(self) -> None:
        super().__init__()

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor:
        """x (B, C, h, w) at the first level of the grid => at its last."""
        there = dict(pairwise(grid))

        def towards(x: Tensor, level: Level) -> Tensor:
            return denoise(x, level._replace(to=there[level]))

        return super().__call__(towards, x, grid, noise=noise, after_step=after_step)
