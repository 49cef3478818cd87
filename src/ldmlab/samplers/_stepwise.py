"""The loop over a grid of levels that all samplers share, and formulas that several of them use.

Steps may be straight in any variable, with the second evaluation anywhere (Karras et al. 2022, algorithm 3). sigma:
x / alpha over sigma / alpha, EDM's choice; variance: over its square, as NCSN++ is sampled; position: x over the path's
position, as flows and DDPM++ are.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from ldmlab.contracts import AfterStep, Denoise, Level, Noise, Path
from ldmlab.errors import InputError, one_of

_ROUNDING = 1e-6  # relative; a level that is a bound but for rounding is inside


@dataclass(frozen=True)
class Step:
    """One step from a level to the next, in addition to x and its clean estimate."""

    number: int
    here: Level  # where x is
    there: Level  # where it goes to
    unrounded: Tensor  # the clean estimate before it was rounded to x's dtype
    denoise: Denoise  # for samplers that evaluate the network twice a step
    noise: Noise
    past: list[Any]  # what a sampler keeps from step to step, empty at first
    nearest: Callable[[Tensor], Tensor]  # of a clean estimate: its codebook vectors with `quantize_x0`, else itself
    path: Path | None = None  # for samplers that evaluate the network between the levels of the grid
    left: int = 0  # steps that follow


class Stepwise(ABC):
    """Evaluates the clean estimate and steps to the next level, down the grid; stateless between calls."""

    order: int | None  # of the error in the length of a step; None: it draws noise
    spacing: str  # default rule of diffusion/schedule.py
    steps: int | None  # default number; None: all levels of the schedule
    idle_without = "temperature: eta, churn_min churn_max churn_noise: churn"
    temperature: float = 1.0  # factor of the noise that steps add
    quantize_x0: bool = False  # replace each clean estimate by the nearest codebook vectors of a VQ first stage
    repeats: bool = False  # take the step between equal levels, which grids of the paper's code may hold
    _churn: "Churn | None" = None  # noise that is added before a step, which then begins at a higher level
    needs_path: bool = False
    extrapolates: bool = False  # from earlier clean estimates, in log-SNR: its steps there must be of similar length
    path: Path | None = None
    _nearest: Callable[[Tensor], Tensor] | None = None

    @abstractmethod
    def step(self, x: Tensor, clean: Tensor, step: Step) -> Tensor:
        """x (B, C, h, w) and its clean estimate at `step.here`, both of x's dtype => x at `step.there`."""

    def __call__(
        self, denoise: Denoise, x: Tensor, grid: list[Level], *, noise: Noise, after_step: AfterStep | None = None
    ) -> Tensor:
        """x (B, C, h, w) at the first level of the grid => at its last."""
        past: list[Any] = []
        nearest = self._nearest if self.quantize_x0 else lambda clean: clean
        if nearest is None:
            raise InputError("sampler.quantize_x0=true needs a first stage with a codebook; leave it out.")

        def fresh(step: int) -> Tensor:
            return self.temperature * noise(step) if self.temperature != 1 else noise(step)

        if self.path is None and (self.needs_path or self._churn):
            raise InputError(f"sampler={type(self).__name__} evaluates between the levels of a grid; call along(path).")
        for number, (here, there) in enumerate(pairwise(grid)):
            if here[:2] == there[:2] and not self.repeats:
                continue
            if self._churn and self.path:
                x, here = self._churn.raised(x, here, len(grid) - 1, self.path, noise, number)
            unrounded = denoise(x, here)
            clean = unrounded.to(x.dtype)
            again = further(denoise, here)
            left = len(grid) - 2 - number
            x = self.step(x, clean, Step(number, here, there, unrounded, again, fresh, past, nearest, self.path, left))
            if after_step is not None:
                x = after_step(number, x, clean)
        return x

    def along(self, path: Path) -> Self:
        """The same sampler with a path, for levels between those of a grid."""
        if not (self.needs_path or self._churn):
            return self
        other = copy.copy(self)
        other.path = path
        return other

    def with_codebook(self, nearest: Callable[[Tensor], Tensor]) -> Self:
        """The same sampler for `quantize_x0`; `nearest`: clean latents (B, C, h, w) => those of their codes."""
        other = copy.copy(self)
        other._nearest = nearest
        return other


@dataclass(frozen=True)
class Churn:
    """Noise before each step (Karras et al. 2022, algorithm 2): sigma / alpha grows by at most the factor sqrt(2).

    The factor is 1 + min(amount / steps, sqrt(2) - 1) where low <= sigma / alpha <= high.
    """

    amount: float
    low: float
    high: float
    scale: float  # of the added noise; the paper's best is 1.003

    def raised(self, x: Tensor, here: Level, steps: int, path: Path, noise: Noise, number: int) -> tuple[Tensor, Level]:
        """x at a noisier level, and that level."""
        ratio = here.sigma / here.alpha if here.alpha else math.inf
        if not (math.isfinite(ratio) and self.low * (1 - _ROUNDING) <= ratio <= self.high * (1 + _ROUNDING)):
            return x, here
        up = path.level_at(ratio * (1 + min(self.amount / steps, math.sqrt(2) - 1)))
        return noised(x, here, up, noise(number), self.scale), up


def noised(x: Tensor, here: Level, up: Level, noise: Tensor, scale: float = 1.0) -> Tensor:
    """x at a noisier level; scale: of the added noise."""
    change = up.alpha / here.alpha
    return change * x + scale * math.sqrt(max(up.sigma**2 - (change * here.sigma) ** 2, 0.0)) * noise


def further(denoise: Denoise, here: Level) -> Denoise:
    """For the further evaluations of a step from `here`, which a guidance interval treats like the first one."""
    return lambda x, level: denoise(x, level._replace(start=here.time))


def checked_churn(churn: float, low: float, high: float, scale: float) -> Churn | None:
    """The options of a sampler with churn; None for 0."""
    if not (0 <= churn < math.inf and 0 <= low <= high and scale > 0):
        raise InputError(f"churn={churn}, churn_min={low}, churn_max={high}, churn_noise={scale} are no churn; use 0.")
    return Churn(churn, low, high, scale) if churn else None


def checked_temperature(temperature: float) -> float:
    """The factor of the noise that steps add."""
    if not (0 <= temperature < math.inf):
        raise InputError(f"temperature={temperature} is not a finite number of 0 or more; 1 leaves the noise as it is.")
    return temperature


def checked_eta(eta: float, most: float = 1.0) -> float:
    """Fraction of a step's noise that is new random noise."""
    if not (0 <= eta <= most and math.isfinite(eta)):
        within = f"within 0 .. {most:g}" if math.isfinite(most) else "a finite number of 0 or more"
        raise InputError(f"eta={eta} is not {within}; 0 draws no noise in sampling, 1 as much as DDPM.")
    return eta


def without_steps(sampler: Any, after_step: AfterStep | None) -> Path:
    """The path of a sampler that chooses its steps itself, which cannot be shown or changed."""
    name = type(sampler).__name__
    if sampler.path is None:
        raise InputError(f"sampler={name} evaluates between the levels of a grid; give it a path by along(path).")
    if after_step is not None:
        raise InputError(f"sampler={name} has no steps to show or to change; choose another, for instance heun.")
    return sampler.path


def first_order(x: Tensor, clean: Tensor, here: Level, there: Level) -> Tensor:
    """alpha' clean + sigma' eps with eps = (x - alpha clean) / sigma put in; alpha = 0 and sigma' = 0 are allowed."""
    kept = there.sigma / here.sigma
    return kept * x + (there.alpha - kept * here.alpha) * clean


def noise_of(x: Tensor, clean: Tensor, level: Level) -> Tensor:
    """eps = (x - alpha clean) / sigma: exactly a float32 network's, where `clean` has kept its digits in float64."""
    return ((x - level.alpha * clean.double()) / level.sigma).to(x.dtype)


def middle(here: Level, there: Level, path: Path | None, fraction: float = 0.5) -> Level | None:
    """The level at a fraction of the step in log(sigma / alpha); None where an end is infinite."""
    if path is None or here.alpha == 0 or there.sigma == 0:
        return None
    return path.level_at((here.sigma / here.alpha) ** (1 - fraction) * (there.sigma / there.alpha) ** fraction)


def ancestral(here: Level, there: Level, eta: float) -> tuple[Level, float]:
    """`there` with sigma_down, and the deviation sigma_up of the noise from it; sigma_up^2 + sigma_down^2 = sigma'^2.

    eta 1: the posterior's, as DDPM; above 1, at most sigma' (k-diffusion, get_ancestral_step).
    """
    up = min(eta * math.sqrt(posterior_variance(here, there)), there.sigma)
    return there._replace(sigma=math.sqrt(there.sigma**2 - up**2)), up


def posterior_variance(here: Level, there: Level) -> float:
    """Variance of x at `there`, given x at the noisier `here` and the clean latent: (sigma'/sigma)^2 sigma_step^2."""
    step_variance = here.sigma**2 - (here.alpha / there.alpha) ** 2 * there.sigma**2
    return max(there.sigma**2 / here.sigma**2 * step_variance, 0.0)


def log_snr(level: Level) -> float:
    """lambda = log(alpha / sigma), the papers' half log-SNR; -inf without signal, inf without noise."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf


VARIABLES = ("sigma", "variance", "position")


def checked_variable(variable: str, alpha: float = 1.0) -> str:
    """The options of `straight_step`."""
    one_of("sampler.variable", variable, VARIABLES)
    if not 0 < alpha <= 1:
        raise InputError(f"sampler.alpha={alpha} is not above 0 and up to 1, Heun's; the midpoint is 0.5.")
    return variable


def straight_step(x: Tensor, clean: Tensor, step: Step, variable: str, alpha: float | None) -> Tensor:
    """x at `step.there`, by the slope at `step.here`, or by 1 - 1 / 2 alpha of it and 1 / 2 alpha of one within.

    alpha: where the second evaluation is, 1 the end of the step; None: there is none.
    """
    here, there, path = step.here, step.there, step.path
    if here.alpha == 0 and variable != "position":
        return first_order(x, clean, here, there)
    start = _place(here, variable, path)
    length = _place(there, variable, path) - start
    slope = _slope(x, clean, here, variable, path)
    if alpha is not None and there.time is not None and there.sigma > 0:
        within = there if alpha == 1 else _level(start + alpha * length, variable, path)
        guess = _scale(within, variable) * (x / _scale(here, variable) + alpha * length * slope)
        second = _slope(guess, step.denoise(guess, within).to(x.dtype), within, variable, path)
        slope = (1 - 0.5 / alpha) * slope + 0.5 / alpha * second
    return _scale(there, variable) * (x / _scale(here, variable) + length * slope)


def _scale(level: Level, variable: str) -> float:
    return 1.0 if variable == "position" else level.alpha


def _place(level: Level, variable: str, path: Path | None) -> float:
    if level.sigma == 0:
        return 0.0
    if variable == "position" and path is not None:
        timed = path.level_at(level.sigma / level.alpha) if level.time is None else level  # the end of a grid
        return float(path.position(time_of(timed)))
    return (level.sigma / level.alpha) ** (1 if variable == "sigma" else 2)


def _level(place: float, variable: str, path: Path | None) -> Level:
    assert path is not None  # refused before the first step
    if variable == "position":
        return path.level(float(path.time(torch.tensor(place, dtype=torch.float64))))
    return path.level_at(place if variable == "sigma" else place**0.5)


def _slope(x: Tensor, clean: Tensor, level: Level, variable: str, path: Path | None) -> Tensor:
    noise = noise_of(x, clean, level)
    if variable == "position" and path is not None:
        d_alpha, d_sigma = (float(rate) for rate in path.rates(time_of(level)))
        return d_alpha * clean + d_sigma * noise
    return noise if variable == "sigma" else noise * (0.5 * level.alpha / level.sigma)


def time_of(level: Level) -> Tensor:
    """The time of a level that is not the end of a grid, (1,) float64."""
    return torch.tensor([level.time], dtype=torch.float64)
