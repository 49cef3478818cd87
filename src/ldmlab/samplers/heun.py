"""Heun's method on the probability flow (Karras et al. 2022, "Elucidating the design space", algorithm 1)."""

import math

from torch import Tensor

from ldmlab.samplers._stepwise import (
    Step,
    Stepwise,
    checked_churn,
    checked_variable,
    first_order,
    noise_of,
    straight_step,
)


class Heun(Stepwise):
    """Two evaluations a step, at its start and at its end; one where the network cannot be evaluated at the end."""

    spacing = "log_snr"
    steps = 25  # 49 evaluations

    def __init__(
        self,
        churn: float = 0.0,  # noise added before each step (Karras et al.: 40), between two values of sigma / alpha
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
        variable: str = "sigma",  # sigma | variance | position: in which steps are straight (`_stepwise.py`)
        alpha: float = 1.0,  # where in a step the second evaluation is; 0.5: the midpoint, 2/3: Ralston's method
    ) -> None:
        self._churn = checked_churn(churn, churn_min, churn_max, churn_noise)
        self.variable, self.alpha = checked_variable(variable, alpha), alpha
        self.needs_path = variable == "position" or alpha != 1
        self.order = None if churn else 2

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """x' by the mean of the slopes eps at both ends, in x / alpha over sigma / alpha or by `variable`."""
        if (self.variable, self.alpha) != ("sigma", 1):
            return straight_step(x, clean, step, self.variable, self.alpha)
        here, there = step.here, step.there
        guess = first_order(x, clean, here, there)
        if there.time is None or there.sigma == 0 or here.alpha == 0:
            return guess
        # d(x / alpha) = eps d(sigma / alpha): the mean of both ends, instead of the first alone
        change = noise_of(guess, step.denoise(guess, there), there) - noise_of(x, clean, here)
        return guess + 0.5 * (there.sigma - there.alpha / here.alpha * here.sigma) * change
