"""Steps that are straight in any variable, with the second evaluation anywhere (Karras et al. 2022, algorithm 3).

sigma: x / alpha over sigma / alpha, EDM's choice; variance: over its square, as NCSN++ is sampled; position: x over the
path's position, as flows and DDPM++ are.
"""

import torch
from torch import Tensor

from ldmlab.contracts import Level, Path
from ldmlab.errors import InputError, one_of
from ldmlab.samplers._stepwise import Step, first_order, noise_of

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
        return float(path.position(_time(timed)))
    return (level.sigma / level.alpha) ** (1 if variable == "sigma" else 2)


def _level(place: float, variable: str, path: Path | None) -> Level:
    assert path is not None  # refused before the first step
    if variable == "position":
        return path.level(float(path.time(torch.tensor(place, dtype=torch.float64))))
    return path.level_at(place if variable == "sigma" else place**0.5)


def _slope(x: Tensor, clean: Tensor, level: Level, variable: str, path: Path | None) -> Tensor:
    noise = noise_of(x, clean, level)
    if variable == "position" and path is not None:
        d_alpha, d_sigma = (float(rate) for rate in path.rates(_time(level)))
        return d_alpha * clean + d_sigma * noise
    return noise if variable == "sigma" else noise * (0.5 * level.alpha / level.sigma)


def _time(level: Level) -> Tensor:
    return torch.tensor([level.time], dtype=torch.float64)
