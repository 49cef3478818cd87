"""Euler steps below the next noise level, and fresh noise up to it, for any pair of alpha and sigma."""

import math

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, ancestral, checked_eta, checked_temperature, first_order


class EulerAncestral(Stepwise):
    """eta 1: the posterior's variance, as in DDPM; eta 0: Euler."""

    order = None
    spacing = "log_snr"
    steps = 50

    def __init__(self, eta: float = 1.0, temperature: float = 1.0) -> None:
        self.eta, self.temperature = checked_eta(eta, math.inf), checked_temperature(temperature)

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """alpha' clean + sigma_down eps + sigma_up noise; sigma_down^2 + sigma_up^2 = sigma'^2."""
        down, fresh = ancestral(step.here, step.there, self.eta)
        x = first_order(x, clean, step.here, down)
        return x + fresh * step.noise(step.number) if fresh > 0 else x
