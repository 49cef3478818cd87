"""Restart sampling (Xu et al. 2023, algorithm 1): an interval of the ODE is repeated, with noise added in between."""

import math
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level, Noise
from ldmlab.errors import InputError
from ldmlab.samplers._stepwise import noised
from ldmlab.samplers.heun import Heun


class Restart(Heun):
    """Heun's steps; at the level nearest `low` the sample is noised to that nearest `high`, `restarts` times.

    The added noise contracts errors made before it, as an SDE's does, with the discretisation error of an ODE.
    """

    idle_without = "low high: restarts"

    def __init__(self, restarts: int = 2, low: float = 0.1, high: float = 2.0) -> None:
        """low, high: of sigma / alpha."""
        super().__init__()
        if restarts < 0 or not 0 < low < high:
            raise InputError(f"restarts={restarts}, low={low}, high={high}: give 0 or more, and 0 < low < high.")
        self.restarts, self.low, self.high = restarts, low, high
        self.order = None if restarts else 2

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor:
        """As a sampler; of a repeated step `after_step` is called for the last pass; noises are numbered in order."""
        ratios = [level.sigma / level.alpha if level.alpha else math.inf for level in grid[:-1]]
        first, last = (_nearest(ratios, value) for value in (self.high, self.low))
        turns = self.restarts if first < last else 0
        noises = 0
        for number, pair in enumerate(pairwise(grid)):
            x = self._one(denoise, x, pair, number, noise, None if first <= number < last and turns else after_step)
            if number + 1 == last:
                for turn in range(turns):
                    x, noises = noised(x, grid[last], grid[first], noise(noises)), noises + 1
                    shown = after_step if turn + 1 == turns else None
                    for again in range(first, last):
                        x = self._one(denoise, x, (grid[again], grid[again + 1]), again, noise, shown)
        return x

    def _one(
        self, denoise: Denoise, x: Tensor, pair: tuple[Level, Level], number: int, noise: Noise, shown: AfterStep | None
    ) -> Tensor:
        after = None if shown is None else lambda _, x, clean: shown(number, x, clean)
        return super().__call__(denoise, x, list(pair), noise=noise, after_step=after)


def _nearest(ratios: list[float], value: float) -> int:
    return min(range(len(ratios)), key=lambda i: abs(math.log(ratios[i] / value)) if ratios[i] > 0 else math.inf)
