"""Which noise levels a number of steps visits: spacings by time, and by sigma / alpha."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ldmlab.errors import InputError, one_of

SPACINGS = ("official", "quad", "linspace", "leading", "trailing", "karras", "log_snr", "polyexponential")
POWERS = {"karras": 7.0, "log_snr": 1.0, "polyexponential": 1.0}  # of spacings by sigma / alpha (eq. 5 of EDM: 7)


def checked_spacing(spacing: str, known: Sequence[str]) -> tuple[str, float]:
    """The name of a spacing and its power rho, which may follow it: `karras:5`."""
    name, colon, text = spacing.partition(":")
    one_of("spacing", name, known)
    try:
        power = float(text) if colon else POWERS.get(name, 1.0)
        fits = math.isfinite(power) and power > 0 and not (colon and name not in ("karras", "polyexponential"))
    except ValueError:
        fits = False
    if not fits:
        raise InputError(f"spacing={spacing} has no such power; write for instance karras:5 or polyexponential:1.5.")
    return name, power


def even_ratios(top: Tensor, bottom: Tensor, steps: int, spacing: str) -> Tensor:
    """log(sigma / alpha) from the noisiest to the least, (steps,) float64, with both ends.

    karras: even in (sigma / alpha)^(1 / rho); log_snr: even in log(sigma / alpha); polyexponential: of that the power
    rho of even numbers (k-diffusion, get_sigmas_polyexponential).
    """
    name, power = checked_spacing(spacing, SPACINGS)
    if not (top.isfinite() and bottom.isfinite()):
        raise InputError(
            f"spacing={spacing} is undefined for a schedule without {'signal' if top.isinf() else 'noise'} at its end; "
            "use linspace or trailing."
        )
    position = torch.linspace(0, 1, steps, dtype=torch.float64)
    if name == "karras":
        return power * torch.log(torch.lerp(torch.exp(top / power), torch.exp(bottom / power), position))
    return torch.lerp(bottom, top, (1 - position) ** power)


def even_times(total: int, steps: int, spacing: str) -> list[int]:
    """Times of T by linspace, also in sections, leading or trailing, noisiest first.

    `linspace:open` and `leading:open` are those of one more step without its last; leading ones are then 1 higher.
    `leading:exact`: every k-th time, the smallest k that gives so many of all T (DiT's `ddim30`).
    """
    name, colon, text = spacing.partition(":")
    if spacing == "leading:exact":
        return _every_kth(total, steps)
    if text == "open" and name in ("linspace", "leading"):  # DPMSolverMultistepScheduler of diffusers
        return [t + (name == "leading") for t in even_times(total, steps + 1, name)[:-1]]
    if name == "linspace":
        if colon:
            return sectioned(total, steps, text)
        return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round().long().tolist()
    checked_spacing(spacing, SPACINGS)
    if name == "leading":
        return [t * (total // steps) for t in reversed(range(steps))]
    return [round(total - k * total / steps) - 1 for k in range(steps)]


def _every_kth(total: int, steps: int) -> list[int]:
    times = range(0, total, -(-total // steps))
    if len(times) != steps:
        raise InputError(f"spacing=leading:exact: no stride gives {steps} of {total} noise levels; use leading.")
    return list(times)[::-1]


def quadratic_times(total: int, steps: int) -> list[int]:
    """The visited indices, noisiest first; small ones repeat where steps are many, as in the paper's code."""
    even = torch.linspace(0, math.sqrt(0.8 * total), steps, dtype=torch.float64)
    times = [int(value) + 1 for value in (even**2).tolist()]
    if times[-1] >= total:
        raise InputError(f"spacing=quad leaves the {total} noise levels of this schedule; use linspace.")
    return times[::-1]


def sectioned(total: int, steps: int, text: str) -> list[int]:
    """Times of T as DiT's `timestep_respacing`, noisiest first; text: counts of sections, low noise first ("10,15,20").

    Within a section times are even and include both its ends; the first sections are the longer ones where their number
    does not divide T. Sums are rounded as in the official program.
    """
    counts = [int(count) for count in text.split(",") if count.isdecimal()]
    if len(counts) != len(text.split(",")) or min(counts) < 1 or sum(counts) != steps:
        raise InputError(
            f"spacing=linspace:{text} with steps={steps}: give a count of 1 or more for each section, which make "
            f"the steps together, for instance linspace:10,15,20 with steps=45."
        )
    size, longer = divmod(total, len(counts))
    times, start = list[int](), 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise InputError(f"spacing=linspace:{text}: a section of {length} noise levels has no {count} of them.")
        stride = (length - 1) / max(count - 1, 1)
        times += [start + round(place) for place in accumulate([0.0] + [stride] * (count - 1))]
        start += length
    return times[::-1]
