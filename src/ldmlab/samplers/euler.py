"""Euler's method on the probability flow (Karras et al. 2022, "Elucidating the design space", section 3)."""

import math

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, checked_churn, checked_variable, first_order, straight_step


class Euler(Stepwise):
    """One evaluation a step; DDIM without noise, on steps that are its own."""

    spacing = "log_snr"
    steps = 50

    def __init__(
        self,
        churn: float = 0.0,  # these four as of `heun`
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        variable: str = "sigma",  # sigma | variance | position: in which steps are straight (`_stepwise.py`)
    ) -> None:
        self._churn = checked_churn(churn, churn_min, churn_max, churn_noise)
        self.variable, self.needs_path = checked_variable(variable), variable == "position"
        self.order = None if churn else 1

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' clean + sigma' eps, unless `variable` is another than sigma."""
        if self.variable != "sigma":
            return straight_step(x, clean, step, self.variable, None)
        return first_order(x, clean, step.here, step.there)
