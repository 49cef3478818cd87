"""DPM-Solver++ (2S) as a stochastic differential equation (Lu et al. 2022; Crowson, k-diffusion)."""

import math

from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.errors import InputError
from ldmlab.samplers._stepwise import Step, Stepwise, ancestral, checked_eta, checked_temperature, first_order, middle


class DpmppSde(Stepwise):
    """Two evaluations and two noises a step: at its start, and at the fraction `r` of it in log(sigma / alpha)."""

    spacing = "log_snr"
    steps = 25  # 49 evaluations
    needs_path = True

    def __init__(self, eta: float = 1.0, temperature: float = 1.0, r: float = 0.5) -> None:
        """eta: 0 no fresh noise; 1 as much as DDPM. r: above 0 and below 1."""
        if not 0 < r < 1:
            raise InputError(f"sampler.r={r} is no place within a step; choose above 0 and below 1, usually 0.5.")
        self.eta, self.temperature, self.r = checked_eta(eta, math.inf), checked_temperature(temperature), r
        self.order: int | None = None if eta > 0 else 2

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """An ancestral step along (1 - 1 / 2r) D + 1 / 2r D_r, D_r at the end of an ancestral step to r."""
        between = middle(step.here, step.there, step.path, self.r)
        if between is not None:
            there = self.moved(x, clean, step, between, 2 * step.number)
            clean = clean + (step.denoise(there, between).to(x.dtype) - clean) / (2 * self.r)
        return self.moved(x, clean, step, step.there, 2 * step.number + 1)

    def moved(self, x: Tensor, clean: Tensor, step: Step, end: Level, draw: int) -> Tensor:
        """To sigma_down of a level, and noise up to it."""
        down, fresh = ancestral(step.here, end, self.eta)
        x = first_order(x, clean, step.here, down)
        return x + fresh * step.noise(draw) if fresh > 0 else x
