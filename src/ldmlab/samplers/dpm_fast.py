"""DPM-Solver of third order on the probability flow (Lu et al. 2022, "DPM-Solver", algorithm 2; Crowson, k-diffusion).

In lambda = log(alpha / sigma), with y = x / alpha and the noise estimate eps: over a step h
    y' = y - sigma'/alpha' ((e^h - 1) eps + w (eps_r - eps)),  w of the order (eq. 4.1 and algorithms 1, 2).
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Path
from ldmlab.samplers._stepwise import (
    ancestral,
    checked_eta,
    checked_temperature,
    first_order,
    log_snr,
    noise_of,
    without_steps,
)

Eps = Callable[[Tensor, float], Tensor]  # y and lambda => the noise estimate


class Singlestep(ABC):
    """From the first to the last finite log-SNR of a grid by steps of its own; from and to infinity Euler's step."""

    spacing = "log_snr"
    needs_path = True
    shows_steps = False  # after_step is refused
    path: Path | None = None
    order: int | None

    def __init__(self, eta: float = 0.0, temperature: float = 1.0) -> None:
        self.eta, self.temperature = checked_eta(eta, math.inf), checked_temperature(temperature)

    def along(self, path: Path) -> Self:
        """The same sampler on a path."""
        other = copy.copy(self)
        other.path = path
        return other

    @abstractmethod
    def across(self, y: Tensor, ends: tuple[float, float], budget: int, eps: Eps, noise: Noise) -> Tensor:
        """y at the first lambda => at the second; budget: of evaluations."""

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor:
        """As a sampler, for which only the ends of the grid and the number of its steps matter."""
        path = without_steps(self, after_step)

        def eps(y: Tensor, place: float) -> Tensor:
            level = path.level_at(math.exp(-place))
            return noise_of(level.alpha * y, denoise(level.alpha * y, level), level)

        if grid[0].alpha == 0:
            x, grid = first_order(x, denoise(x, grid[0]).to(x.dtype), grid[0], grid[1]), grid[1:]
        inside = grid[:-1] if grid[-1].sigma == 0 else grid
        if len(inside) > 1:
            first, last = inside[0], inside[-1]
            y = self.across(x / first.alpha, (log_snr(first), log_snr(last)), len(inside) - 1, eps, noise)
            x = last.alpha * y
        if 0 < len(inside) < len(grid):
            x = first_order(x, denoise(x, inside[-1]).to(x.dtype), inside[-1], grid[-1])
        return x

    def split(self, start: float, end: float, last: float) -> tuple[float, float]:
        """lambda before fresh noise, not beyond `last`, and the deviation of that noise in y."""
        if not self.eta:
            return end, 0.0
        here, there = (Level(1.0, math.exp(-place), None) for place in (start, end))
        down, _ = ancestral(here, there, self.eta)
        quiet = min(log_snr(down), last)
        return quiet, self.temperature * math.sqrt(max(math.exp(-2 * end) - math.exp(-2 * quiet), 0.0))


class DpmFast(Singlestep):
    """As many evaluations as steps: steps of order 3, even in log-SNR, and one or two of a lower order at the end."""

    steps = 20

    def __init__(self, eta: float = 0.0, temperature: float = 1.0) -> None:
        """eta: 0 no fresh noise; 1 as much as DDPM."""
        super().__init__(eta, temperature)
        self.order = None if eta > 0 else 2  # that of a single last step of first order

    def across(self, y: Tensor, ends: tuple[float, float], budget: int, eps: Eps, noise: Noise) -> Tensor:
        """Steps of the orders 3, ..., 3 and the rest."""
        orders = [3] * (budget // 3 - 1) + [2, 1] if budget % 3 == 0 else [3] * (budget // 3) + [budget % 3]
        places = torch.linspace(*ends, len(orders) + 1, dtype=torch.float64).tolist()
        for number, ((start, end), order) in enumerate(zip(pairwise(places), orders, strict=True)):
            quiet, fresh = self.split(start, end, ends[1])
            y = solved(y, start, quiet, eps, eps(y, start), order)[-1]
            y = y + fresh * noise(number) if fresh > 0 else y
        return y


def solved(y: Tensor, start: float, end: float, eps: Eps, known: Tensor, order: int) -> list[Tensor]:
    """y' of the orders up to `order`, of which the last is meant; known: eps at the start."""
    h = end - start
    found = [moved(y, start, end, known)]
    if order > 1:
        r = 1 / order
        change = eps(moved(y, start, start + r * h, known), start + r * h) - known
        found.append(moved(y, start, end, known, change, math.expm1(h) / (2 * r)))
    if order > 2:
        place = start + 2 * h / 3
        ahead = moved(y, start, place, known, change, 2 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1))
        found.append(moved(y, start, end, known, eps(ahead, place) - known, 1.5 * (math.expm1(h) / h - 1)))
    return found


def moved(
    y: Tensor, start: float, end: float, eps: Tensor, change: Tensor | float = 0.0, weight: float = 0.0
) -> Tensor:
    """y - sigma'/alpha' ((e^h - 1) eps + weight change)."""
    return y - math.exp(-end) * (math.expm1(end - start) * eps + weight * change)
