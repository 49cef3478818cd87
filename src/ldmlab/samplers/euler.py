"""Euler's method on the probability flow (Karras et al. 2022, "Elucidating the design space", section 3)."""

import math

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, checked_churn, first_order


class Euler(Stepwise):
    """One evaluation a step; DDIM without noise, on steps that are its own."""

    spacing = "log_snr"
    steps = 50

    def __init__(
        self, churn: float = 0.0, churn_min: float = 0.0, churn_max: float = math.inf, churn_noise: float = 1.0
    ) -> None:
        """churn: noise added before each step (Karras et al.: 40), between two values of sigma / alpha."""
        self._churn = checked_churn(churn, churn_min, churn_max, churn_noise)
        self.order = None if churn else 1

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' clean + sigma' eps."""
        return first_order(x, clean, step.here, step.there)
