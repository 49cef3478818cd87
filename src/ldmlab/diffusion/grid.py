"""Grids of noise levels for samplers: noisiest first, the end without a time."""

import math

import torch

from ldmlab.contracts import Level
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError

SPACINGS = ("official", "linspace", "trailing")


def ddim_grid(schedule: Schedule, steps: int, spacing: str = "official") -> list[Level]:
    """`steps` levels of the schedule and the end.

    official: stride T // steps from 0, every index + 1, ending at alpha_bar(0) instead of 1 (paper's code);
    linspace: T - 1 .. 0 with both ends; trailing: T - 1 down in steps of T / steps.
    The last two end at the clean latent.
    """
    total = schedule.steps
    if not 1 <= steps <= total:
        raise InputError(f"steps={steps} is not within 1 .. {total}, the noise levels of the model's schedule.")
    if spacing == "official":
        times = _official_times(total, steps)
        return [_level(schedule, t) for t in times] + [_level(schedule, 0)._replace(time=None)]
    if spacing == "linspace":
        times = torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    elif spacing == "trailing":
        times = [round(total - k * total / steps) - 1 for k in range(steps)]
    else:
        raise InputError(f"spacing={spacing} is no step rule; there are {', '.join(SPACINGS)}.")
    return [_level(schedule, t) for t in times] + [Level(1.0, 0.0, None)]


def ddpm_grid(schedule: Schedule, steps: int | None = None) -> list[Level]:
    """Every level of the schedule, or `steps` of them with both ends, down to the clean latent."""
    return ddim_grid(schedule, steps or schedule.steps, "linspace")


def _level(schedule: Schedule, t: int) -> Level:
    alpha_bar = float(schedule.alpha_bar[t])
    return Level(math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar), float(t))


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
