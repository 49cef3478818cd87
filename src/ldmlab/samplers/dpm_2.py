"""DPM-Solver-2 (Lu et al. 2022; Karras et al. 2022): the slope at the middle of a step in log(sigma / alpha)."""

import math

from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.samplers._stepwise import (
    Step,
    Stepwise,
    ancestral,
    checked_churn,
    checked_eta,
    checked_temperature,
    first_order,
    middle,
    noise_of,
)


class Dpm2(Stepwise):
    """Two evaluations a step; eta above 0: ancestral, the step ends lower and noise is added."""

    spacing = "log_snr"
    steps = 25  # 49 evaluations
    needs_path = True

    def __init__(
        self,
        eta: float = 0.0,
        temperature: float = 1.0,
        churn: float = 0.0,  # these four as of `heun`
        churn_min: float = 0.0,
        churn_max: float = math.inf,
        churn_noise: float = 1.0,
    ) -> None:
        self.eta, self.temperature = checked_eta(eta, math.inf), checked_temperature(temperature)
        self._churn = checked_churn(churn, churn_min, churn_max, churn_noise)
        self.order: int | None = None if eta > 0 or churn else 2

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """To sigma_down by two evaluations, and noise up to sigma'."""
        down, fresh = ancestral(step.here, step.there, self.eta)
        halfway = middle(step.here, down, step.path)
        if halfway is None:
            x = first_order(x, clean, step.here, down)
        else:
            guess = first_order(x, clean, step.here, halfway)
            x = self.second(x, guess, step.denoise(guess, halfway), (step.here, halfway, down))
        return x + fresh * step.noise(step.number) if fresh > 0 else x

    def second(self, x: Tensor, guess: Tensor, clean: Tensor, levels: tuple[Level, Level, Level]) -> Tensor:
        """alpha' (x / alpha + (sigma'/alpha' - sigma/alpha) eps) with the middle's eps."""
        here, halfway, down = levels
        eps = noise_of(guess, clean, halfway)
        return down.alpha / here.alpha * x + (down.sigma - down.alpha / here.alpha * here.sigma) * eps
