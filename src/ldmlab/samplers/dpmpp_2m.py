"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): multistep, second order, in log-SNR."""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level
from ldmlab.samplers.euler import first_order


class Dpmpp2M:
    """One evaluation a step; the clean estimate is carried on along the line through the last two."""

    order = 2
    spacing = "log_snr"
    steps = 25  # where nobody says how many

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,  # (B, C, h, w) at grid[0]
        grid: list[Level],
        *,
        noise: Callable[[int], Tensor],
        after_step: AfterStep | None = None,
    ) -> Tensor:
        """x at the last level of the grid; the first step and those to or from infinite log-SNR are first-order."""
        before, last_length = None, math.inf
        for step, (here, there) in enumerate(pairwise(grid)):
            clean = denoise(x, here).to(x.dtype)
            length = log_snr(there) - log_snr(here)  # h
            ahead = length / (2 * last_length) if math.isfinite(length) else 0.0  # 1 / 2r
            estimate = clean if before is None else clean + ahead * (clean - before)
            x = first_order(x, estimate, here, there)
            before, last_length = clean, length
            if after_step is not None:
                x = after_step(step, x, clean)
        return x


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma), the paper's half log-SNR; -inf without signal, inf without noise."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf
