"""The reverse diffusion of a path with any amount of noise (Ma et al. 2024, "SiT", eq. 5; Song et al. 2021, eq. 6).

Down the positions s of a path, with a diffusion w(s), score = -eps / sigma and independent noise n:
    dx = (alpha' clean + sigma' eps) ds - w score |ds| + sqrt(2 w |ds|) n
has the same distributions at every s whatever w is.
"""

import math

from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.errors import InputError, one_of
from ldmlab.samplers._stepwise import Step, Stepwise, checked_temperature, first_order, noise_of, time_of

FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing")
LAST = ("mean", "euler", "tweedie")


class Sde(Stepwise):
    """Euler-Maruyama or Heun with a diffusion form; the last step, to the clean end, adds no noise."""

    order = None
    spacing = "linspace"
    steps = 250
    needs_path = True

    def __init__(
        self,
        method: str = "euler",  # euler (Maruyama) | heun, two evaluations a step
        form: str = "sigma",  # of w: constant 1, sbdm (the forward diffusion's), sigma, linear s, and SiT's two others
        norm: float = 1.0,  # factor of w
        last: str = "mean",  # the last step: mean (the equation without noise) | euler (the flow's) | tweedie
        temperature: float = 1.0,
    ) -> None:
        one_of("sampler.method", method, ("euler", "heun"))
        one_of("sampler.form", form, FORMS)
        one_of("sampler.last", last, LAST)
        if not norm >= 0:
            raise InputError(f"sampler.norm={norm} is no factor of the noise; choose 0 or more.")
        self.method, self.form, self.norm, self.last = method, form, norm, last
        self.temperature = checked_temperature(temperature)

    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """One step of s, or the last one."""
        here, there = step.here, step.there
        if here.time is None:
            return x
        length = self._position(here) - self._position(there)
        if there.time is None or there.sigma == 0:
            return self._last(x, step, length)
        noise = math.sqrt(2 * self.diffusion(here) * length) * step.noise(step.number)
        if self.method == "euler":
            return x - length * self.drift(x, step.unrounded, here) + noise
        x = x + noise
        first = self.drift(x, step.denoise(x, here), here)
        ahead = x - length * first
        return x - 0.5 * length * (first + self.drift(ahead, step.denoise(ahead, there), there))

    def _last(self, x: Tensor, step: Step, length: float) -> Tensor:
        if self.last == "tweedie" or step.here.alpha == 0:
            return first_order(x, step.unrounded.to(x.dtype), step.here, step.there)
        return x - length * self.drift(x, step.unrounded, step.here, noisy=self.last == "mean")

    def drift(self, x: Tensor, clean: Tensor, level: Level, noisy: bool = True) -> Tensor:
        """alpha' clean + (sigma' + w / sigma) eps, by s; without `noisy` that of the flow."""
        d_alpha, d_sigma = self._rates(level)
        pull = self.diffusion(level) / level.sigma if noisy else 0.0
        return d_alpha * clean.to(x.dtype) + (d_sigma + pull) * noise_of(x, clean, level)

    def diffusion(self, level: Level) -> float:
        """w of a level."""
        s = self._position(level)
        if self.form == "sbdm":
            if level.alpha == 0:
                raise InputError("sampler.form=sbdm is infinite where no signal is left; choose sigma or linear.")
            d_alpha, d_sigma = self._rates(level)
            return self.norm * level.sigma * (d_sigma * level.alpha - level.sigma * d_alpha) / level.alpha
        if self.form == "decreasing":
            return 0.25 * (1 - self.norm * math.cos(math.pi * s)) ** 2
        forms = {
            "constant": 1.0,
            "sigma": level.sigma,
            "linear": s,
            "increasing_decreasing": math.sin(math.pi * s) ** 2,
        }
        return self.norm * forms[self.form]

    def _position(self, level: Level) -> float:
        assert self.path is not None
        return 0.0 if level.time is None else float(self.path.position(time_of(level)))

    def _rates(self, level: Level) -> tuple[float, float]:
        assert self.path is not None
        d_alpha, d_sigma = self.path.rates(time_of(level))
        return float(d_alpha), float(d_sigma)
