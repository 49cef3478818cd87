"""DPM-Solver++ as a stochastic differential equation, multistep, in log-SNR (Lu et al. 2022; Crowson, k-diffusion)."""

import math

from torch import Tensor

from ldmlab.samplers._stepwise import Step, Stepwise, checked_eta, checked_temperature, first_order, log_snr

_FEW = 15  # steps, as in diffusers


class Dpmpp3MSde(Stepwise):
    """One evaluation and one noise a step; of third order without noise. Steps to or from infinity are first-order."""

    extrapolates = True
    steps = 25
    depth = 3  # estimates that are used

    def __init__(
        self,
        eta: float = 1.0,  # 0: no fresh noise; 1: that of the reverse diffusion
        temperature: float = 1.0,
        midpoint: bool = False,  # in steps of second order the earlier estimate weighs (1 - e^-k) / 2; false: phi_2
        lower_order_final: bool = False,  # the last two of fewer than 15 steps are of second and first order
        euler_at_final: bool = False,  # the last step is of first order
        spacing: str = "log_snr",  # the default step rule
    ) -> None:
        self.midpoint, self.spacing = midpoint, spacing
        self.lower_order_final, self.euler_at_final = lower_order_final, euler_at_final
        self.eta, self.temperature = checked_eta(eta, math.inf), checked_temperature(temperature)
        self.order: int | None = None if eta > 0 else self.depth

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """sigma'/sigma e^(-eta h) x + alpha' ((1 - e^-k) D + phi_2 D' h - phi_3 D'' h^2), k = (1 + eta) h, + noise."""
        here, there, past = step.here, step.there, step.past  # past: (h, clean) of the steps before, newest first
        length = log_snr(there) - log_snr(here)  # h
        if not math.isfinite(length):
            past.clear()
            return first_order(x, clean, here, there)
        decay, whole = math.exp(-self.eta * length), (1 + self.eta) * length
        x = there.sigma / here.sigma * decay * x - there.alpha * math.expm1(-whole) * clean
        few = step.number + step.left + 1 < _FEW
        lowered = (self.lower_order_final and few) or (self.euler_at_final and step.left == 0)
        x = x + there.alpha * self.bend(clean, past[: step.left] if lowered else past, length, whole)
        past[:] = [(length, clean), *past][: self.depth - 1]
        fresh = there.sigma * math.sqrt(-math.expm1(-2 * self.eta * length))
        return x + fresh * step.noise(step.number) if fresh > 0 else x

    def bend(self, clean: Tensor, past: list[tuple[float, Tensor]], length: float, whole: float) -> Tensor | float:
        """What derivatives of the estimate, from those before, add to the first-order step."""
        if not past:
            return 0.0
        second = math.expm1(-whole) / whole + 1  # phi_2
        ratio = past[0][0] / length
        slope = (clean - past[0][1]) / ratio
        if len(past) == 1:
            return (-0.5 * math.expm1(-whole) if self.midpoint else second) * slope
        before = past[1][0] / length
        earlier = (past[0][1] - past[1][1]) / before
        slope, curve = slope + (slope - earlier) * ratio / (ratio + before), (slope - earlier) / (ratio + before)
        return second * slope - (second / whole - 0.5) * curve  # phi_3
