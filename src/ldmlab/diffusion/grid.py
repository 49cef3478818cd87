"""Grids of noise levels for samplers: noisiest first, the end without a time."""

import math

import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError

SPACINGS = ("official", "linspace", "trailing", "karras", "log_snr")
RHO = 7  # Karras et al. 2022, eq. 5


def ddim_grid(schedule: Schedule, steps: int, spacing: str = "official") -> list[Level]:
    """`steps` levels of the schedule and the end.

    official: stride T // steps from 0, every index + 1, ending at alpha_bar(0) instead of 1 (paper's code);
    linspace: T - 1 .. 0 with both ends; trailing: T - 1 down in steps of T / steps;
    karras: even in (sigma / alpha)^(1 / 7), log_snr: even in log(alpha / sigma), both with both ends, between the
    schedule's levels too, where the network is told a time with a fraction.
    All but the first end at the clean latent.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise InputError(f"steps={steps} is not within 1 .. {total}, the noise levels of the model's schedule.")
    if spacing == "official":
        # rounded as the paper's code keeps its table, so that samples end where its samples do
        table = schedule.alpha_bar.float()
        return [_level(table, t) for t in _official_times(total, steps)] + [_level(table, 0)._replace(time=None)]
    return [*_levels(schedule.alpha_bar, steps, spacing), Level(1.0, 0.0, None)]


def ddpm_grid(schedule: Schedule, steps: int | None = None) -> list[Level]:
    """Every level of the schedule, or `steps` of them with both ends, down to the clean latent."""
    return ddim_grid(schedule, steps or schedule.steps, "linspace")


def _levels(alpha_bar: Tensor, steps: int, spacing: str) -> list[Level]:
    total = len(alpha_bar)
    if spacing == "linspace":
        times = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long().tolist()
        return [_level(alpha_bar, t) for t in times]
    if spacing == "trailing":
        return [_level(alpha_bar, round(total - k * total / steps) - 1) for k in range(steps)]
    if spacing not in SPACINGS:
        raise InputError(f"spacing={spacing} is no step rule; there are {', '.join(SPACINGS)}.")
    if alpha_bar[-1] == 0:
        raise InputError(f"spacing={spacing} is undefined for a schedule without signal at its end; use trailing.")
    known = 0.5 * torch.logit(alpha_bar)  # (T,) log(alpha / sigma), falling
    top, bottom = known[-1], known[0]
    share = torch.linspace(0, 1, steps, dtype=torch.float64)
    if spacing == "log_snr":
        wanted = torch.lerp(top, bottom, share)
    else:  # (sigma / alpha)^(1 / rho) = exp(-log_snr / rho)
        wanted = -RHO * torch.log(torch.lerp(torch.exp(-top / RHO), torch.exp(-bottom / RHO), share))
    return [_between(known, value) for value in wanted]


def _level(alpha_bar: Tensor, t: int) -> Level:
    return Level(math.sqrt(alpha_bar[t]), math.sqrt(1 - alpha_bar[t]), float(t))


def _between(known: Tensor, wanted: Tensor) -> Level:
    """The level of a log(alpha / sigma); its time lies on the straight line between the two nearest known ones."""
    last = len(known) - 1
    right = min(max(int((known > wanted).sum()), 1), last) if last else 0  # first index that is not above
    left = max(right - 1, 0)
    width = float(known[left] - known[right])
    time = left + float(known[left] - wanted) / width if width > 0 else 0.0
    signal = torch.sigmoid(2 * wanted)
    return Level(math.sqrt(signal), math.sqrt(1 - signal), min(max(time, 0.0), float(last)))


def _official_times(total: int, steps: int) -> list[int]:
    """The visited indices, noisiest first; only numbers of steps that the official rule really takes."""
    if not _official_works(total, steps):
        nearest = sorted((s for s in range(1, total + 1) if _official_works(total, s)), key=lambda s: abs(s - steps))[
            :2
        ]
        raise InputError(
            f"steps={steps}: the paper's step rule with stride {total} // {steps} cannot take exactly that many of the "
            f"{total} noise levels; use steps={' or '.join(map(str, sorted(nearest)))}, or spacing=linspace."
        )
    return [t + 1 for t in range(0, total, total // steps)][::-1]


def _official_works(total: int, steps: int) -> bool:
    """The rule takes ceil(T / stride) steps and leaves the table when the last index + 1 is T."""
    stride = total // steps
    visited = range(0, total, stride)
    return len(visited) == steps and visited[-1] + 1 < total
