"""How much of a latent is left at each time of a schedule: what the latent scale decides.

x = alpha z + sigma eps has the signal-to-noise ratio alpha^2 Var(z) / sigma^2. Latents that are not rescaled to
variance 1 keep more signal at every time, so a denoiser places details early, while it still lays out the image; the
paper finds that this spoils samples larger than those of training (section 4.3.2, appendix D.1).
"""

import math

import torch
from torch import Tensor

from ldmlab.diffusion.schedule import Schedule


def signal_to_noise(schedule: Schedule, variance: float) -> Tensor:
    """alpha^2 Var(z) / sigma^2 at every time, (T,) float64; infinite where there is no noise."""
    alpha_bar = schedule.alpha_bar.double()
    return variance * alpha_bar / (1 - alpha_bar)


def even_time(schedule: Schedule, variance: float) -> int | None:
    """The first time at which noise is at least as strong as signal; None if that never happens."""
    weaker = torch.nonzero(signal_to_noise(schedule, variance) <= 1)
    return int(weaker[0]) if len(weaker) else None


def decibels(ratio: float) -> float:
    """10 log10, which is 0 where signal and noise are equally strong."""
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf
