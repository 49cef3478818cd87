"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2): multistep, second order, in log-SNR."""

import math

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, first_order, log_snr


class Dpmpp2M(Stepwise):
    """One evaluation a step; the clean estimate is carried on along the line through the last two.

    The first step and those to or from infinite log-SNR are first-order.
    """

    order = 2
    spacing = "log_snr"
    extrapolates = True
    steps = 25

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """sigma'/sigma x - alpha' (exp(-h) - 1) D with D = clean + h / (2 h_before) (clean - clean_before)."""
        length = log_snr(step.there) - log_snr(step.here)  # h
        estimate = clean
        if step.past:
            last_length, before = step.past[0]
            ahead = length / (2 * last_length) if math.isfinite(length) else 0.0  # 1 / 2r
            estimate = clean + ahead * (clean - before)
        step.past[:] = [(length, clean)]
        return first_order(x, estimate, step.here, step.there)
