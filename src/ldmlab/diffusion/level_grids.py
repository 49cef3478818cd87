"""Levels of a discrete schedule: tables of alpha and sigma, and the grids of levels that samplers step over.

Times are 0 .. T - 1, 0 the least noisy. A schedule has `steps` (T) and `levels` (contracts.Schedule).
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.errors import InputError, one_of

SPACINGS = ("official", "quad", "linspace", "trailing", "karras", "log_snr")
RHO = 7  # Karras et al. 2022, eq. 5
_SAME = 1e-5  # relative; float32 rounds to 1e-7


class Levels(NamedTuple):
    """alpha and sigma of every time, float64 (T,)."""

    alpha: Tensor
    sigma: Tensor

    def at(self, t: int) -> Level:
        """The level of a time."""
        return Level(float(self.alpha[t]), float(self.sigma[t]), float(t))

    @property
    def log_snr(self) -> Tensor:
        """log(alpha / sigma), (T,), falling; infinite where there is no noise or no signal."""
        return torch.log(self.alpha / self.sigma)


def levels_of(schedule: Any, *, rounded: bool = False) -> Levels:
    """What `schedule.levels` gives, with the digits of `alpha_bar` where both are the same levels.

    rounded: alpha_bar in float32, as the paper's code keeps its table.
    """
    if missing := [name for name in ("steps", "levels") if not hasattr(schedule, name)]:
        raise InputError(
            f"diffusion.schedule={type(schedule).__name__} has no {' and no '.join(missing)}; a schedule needs steps "
            "and levels(t), see contracts.Schedule."
        )
    found = schedule.levels(torch.arange(schedule.steps))
    if len(found) != 2 or any(part.shape != (schedule.steps, 1, 1, 1) for part in found):
        raise InputError(
            f"diffusion.schedule={type(schedule).__name__}: levels(t) must give alpha and sigma, each of shape "
            "(len(t), 1, 1, 1)."
        )
    alpha, sigma = (part.detach().cpu().double().flatten() for part in found)
    alpha_bar = getattr(schedule, "alpha_bar", None)
    if alpha_bar is not None and alpha_bar.shape == alpha.shape:
        alpha_bar = alpha_bar.float() if rounded else alpha_bar.double()
        exact = alpha_bar.double().sqrt(), (1 - alpha_bar).double().sqrt()
        if all(torch.allclose(a, b, rtol=_SAME, atol=1e-6) for a, b in zip((alpha, sigma), exact, strict=True)):
            return Levels(*exact)
    return Levels(alpha, sigma)


def ddim_grid(schedule: Any, steps: int, spacing: str = "official") -> list[Level]:
    """`steps` levels of the schedule and the end.

    official: stride T // steps from 0, every index + 1, ending at the level of time 0 (paper's code);
    quad: the squares of `steps` even numbers up to sqrt(0.8 T), rounded down, + 1, ending as official (paper's code);
    linspace: T - 1 .. 0 with both ends; trailing: T - 1 down in steps of T / steps;
    karras: even in (sigma / alpha)^(1 / 7), log_snr: even in log(alpha / sigma), both with both ends, between the
    schedule's levels too, where the network's time has a fraction.
    All but the first two end at the clean latent.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise InputError(f"steps={steps} is not within 1 .. {total}, the noise levels of the model's schedule.")
    if spacing in ("official", "quad"):
        levels = levels_of(schedule, rounded=True)  # so that samples end where the official samples do
        times = _official_times(total, steps) if spacing == "official" else _quadratic_times(total, steps)
        return [*(levels.at(t) for t in times), levels.at(0)._replace(time=None)]
    visited = _visited(levels_of(schedule), steps, spacing)
    return [*(level for level in visited if level.sigma > 0), Level(1.0, 0.0, None)]


def _visited(levels: Levels, steps: int, spacing: str) -> list[Level]:
    total = len(levels.alpha)
    if spacing == "linspace":
        times = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        return [levels.at(t) for t in times]
    if spacing == "trailing":
        return [levels.at(round(total - k * total / steps) - 1) for k in range(steps)]
    one_of("spacing", spacing, SPACINGS)
    known = levels.log_snr
    if not bool(known.isfinite().all()):
        lacks = "signal" if float(levels.alpha.min()) == 0 else "noise"
        raise InputError(
            f"spacing={spacing} is undefined for a schedule without {lacks} at its end; use linspace or trailing."
        )
    top, bottom = known[-1], known[0]
    position = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "log_snr":
        targets = torch.lerp(top, bottom, position)
    else:  # (sigma / alpha)^(1 / rho) = exp(-log_snr / rho)
        targets = -RHO * torch.log(torch.lerp(torch.exp(-top / RHO), torch.exp(-bottom / RHO), position))
    radius = torch.hypot(levels.alpha, levels.sigma)  # 1 for variance-preserving schedules
    return [between(known, radius, value) for value in targets]


def between(known: Tensor, radius: Tensor, target: Tensor) -> Level:
    """The level of a log(alpha / sigma); time and radius lie on the straight line between the nearest known ones."""
    last = len(known) - 1
    right = min(max(int((known > target).sum()), 1), last) if last else 0  # first index that is not above
    left = max(right - 1, 0)
    width = float(known[left] - known[right])
    fraction = float(known[left] - target) / width if width > 0 else 0.0
    scale = float(torch.lerp(radius[left], radius[right], fraction))
    signal = torch.sigmoid(2 * target)
    time = min(max(left + fraction, 0.0), float(last))
    return Level(scale * math.sqrt(signal), scale * math.sqrt(1 - signal), time)


def _quadratic_times(total: int, steps: int) -> list[int]:
    """The visited indices, noisiest first; small ones repeat where steps are many, as in the paper's code."""
    even = torch.linspace(0, math.sqrt(0.8 * total), steps, dtype=torch.float64)
    times = [int(value) + 1 for value in (even**2).tolist()]
    if times[-1] >= total:
        raise InputError(f"spacing=quad leaves the {total} noise levels of this schedule; use linspace.")
    return times[::-1]


def _official_times(total: int, steps: int) -> list[int]:
    """The visited indices, noisiest first; only numbers of steps that the official rule really takes."""

    def visited(steps: int) -> range:
        return range(1, total + 1, total // steps)  # leaves the table when its last is T

    def works(steps: int) -> bool:
        return len(visited(steps)) == steps and visited(steps)[-1] < total

    if not works(steps):
        nearest = sorted(filter(works, range(1, total + 1)), key=lambda other: abs(other - steps))[:2]
        raise InputError(
            f"steps={steps}: the paper's step rule with stride {total} // {steps} cannot take exactly that many of the "
            f"{total} noise levels; use steps={' or '.join(map(str, sorted(nearest)))}, or spacing=linspace."
        )
    return list(visited(steps))[::-1]
