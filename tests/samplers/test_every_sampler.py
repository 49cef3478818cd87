"""What every sampler must hold, on Gaussians whose exact denoiser is known; samplers are found by their files."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.grid import ddim_grid
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.randomness import normal
from ldmlab.samplers import sampler_by_name, sampler_names

MEAN, STD = 0.4, 0.6
ORDER = {"ddim": 1}  # of deterministic samplers on a smooth path; halving the steps must cost 2^order


def denoise(x: Tensor, level: Level) -> Tensor:
    """E[clean | x] of clean ~ N(MEAN, STD^2)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    return MEAN + gain * (x - level.alpha * MEAN)


def exact_end(x: Tensor, grid: list[Level]) -> Tensor:
    """Where the probability flow takes x: Gaussians keep their quantiles."""
    spread = [math.sqrt(level.alpha**2 * STD**2 + level.sigma**2) for level in (grid[0], grid[-1])]
    return grid[-1].alpha * MEAN + spread[1] / spread[0] * (x - grid[0].alpha * MEAN)


def draw(step: int) -> Tensor:
    return normal(1, "sample", torch.arange(4000), (), step=step + 1).double()


def run(name: str, x: Tensor, grid: list[Level], **options: Any) -> Tensor:
    return sampler_by_name(name)(denoise, x, grid, noise=draw, **options)


def smooth_grid(steps: int) -> list[Level]:
    """Levels evenly spaced in angle: no kink of a discrete schedule hides the order."""
    angles = [1.5 - k * (1.5 - 0.05) / steps for k in range(steps + 1)]
    return [Level(math.cos(a), math.sin(a), None if k == steps else a) for k, a in enumerate(angles)]


@pytest.mark.parametrize("name", sorted(ORDER))
def test_order(name: str) -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    errors = []
    for steps in (40, 80, 160):
        grid = smooth_grid(steps)
        errors.append(float((run(name, x, grid) - exact_end(x, grid)).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert orders == pytest.approx([ORDER[name]] * 2, abs=0.1)


@pytest.mark.parametrize("name", sampler_names())
def test_samples_have_the_right_distribution(name: str) -> None:
    grid = ddim_grid(Schedule(), 250, "linspace")
    x = run(name, normal(0, "start", torch.arange(4000), ()).double(), grid)
    # standard errors of 4,000 draws: 0.0095 of the mean, 0.0067 of the deviation; the steps themselves cost less
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.04)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", sampler_names())
def test_after_step_sees_every_step_and_may_change_x(name: str) -> None:
    seen = []

    def after_step(step: int, x: Tensor, clean: Tensor) -> Tensor:
        seen.append(step)
        assert clean.shape == x.shape
        return torch.zeros_like(x)

    x = run(name, torch.ones(4000, dtype=torch.float64), ddim_grid(Schedule(), 5), after_step=after_step)
    assert seen == [0, 1, 2, 3, 4]
    assert not x.any()


@pytest.mark.parametrize("name", sampler_names())
def test_float32_stays_float32(name: str) -> None:
    x = sampler_by_name(name)(denoise, torch.zeros(3), ddim_grid(Schedule(), 5), noise=lambda step: torch.zeros(3))
    assert x.dtype == torch.float32


def test_names_and_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="sampler=dimm is no sampler; there are ddim"):
        sampler_by_name("dimm")
    with pytest.raises(InputError, match=r"eta=0.5: the sampler ddpm has no such setting"):
        sampler_by_name("ddpm", eta=0.5)
    with pytest.raises(InputError, match=r"eta=1.5 is not within"):
        sampler_by_name("ddim", eta=1.5)
