"""temperature, quantize_x0 and quadratic steps against the loops of the paper's code, written down here once more."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.paths import EdmPath
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.vq import VQModel
from ldmlab.inference.sample_settings import SAMPLERS, sampler_by_name

SHAPE = (2, 3, 4, 4)
SCHEDULE = Schedule()


def noise(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def network(x: Tensor, t: float) -> Tensor:
    return 0.8 * torch.tanh(x * (0.5 + t / 1000)) + 0.1 * math.sin(t / 100)


def denoise(x: Tensor, level: Level) -> Tensor:
    assert level.time is not None
    return EpsPrediction().clean(x, network(x, level.time), level)


def codes(clean: Tensor) -> Tensor:
    """A codebook: multiples of 0.4 up to 2."""
    return (clean / 0.4).round().clamp(-5, 5) * 0.4


def as_it_is(clean: Tensor) -> Tensor:
    return clean


def official_times(method: str, steps: int) -> np.ndarray:
    if method == "quad":
        return (np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2).astype(int) + 1
    return np.arange(0, 1000, 1000 // steps) + 1


def official_ddim(times: np.ndarray, eta: float, temperature: float, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    bar = SCHEDULE.alpha_bar.float().double().numpy()
    before = [bar[0], *bar[times[:-1]]]
    x = noise(99)
    for number, t in enumerate(times[::-1]):
        a, b = bar[t], before[len(times) - 1 - number]
        sigma = eta * math.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0))
        eps = network(x, float(t))
        x0 = nearest((x - math.sqrt(1 - a) * eps) / math.sqrt(a))
        x = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * eps + sigma * temperature * noise(number)
    return x


def official_plms(times: np.ndarray, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    bar = SCHEDULE.alpha_bar.float().double().numpy()
    before, old = [bar[0], *bar[times[:-1]]], []

    def moved(x: Tensor, eps: Tensor, index: int) -> Tensor:
        a, b = bar[times[index]], before[index]
        return math.sqrt(b) * nearest((x - math.sqrt(1 - a) * eps) / math.sqrt(a)) + math.sqrt(1 - b) * eps

    x = noise(99)
    for index in range(len(times))[::-1]:
        eps = network(x, float(times[index]))
        if not old:
            ahead = network(moved(x, eps, index), float(times[max(index - 1, 0)]))
            mixed = (eps + ahead) / 2
        elif len(old) == 1:
            mixed = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            mixed = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mixed = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = moved(x, mixed, index)
        old = [*old, eps][-3:]
    return x


def official_ddpm(temperature: float, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    bar, betas = SCHEDULE.alpha_bar.numpy(), SCHEDULE.betas.numpy()
    x = noise(99)
    for number, t in enumerate(range(999, -1, -1)):
        a, b = bar[t], bar[t - 1] if t else 1.0
        x0 = nearest((x - math.sqrt(1 - a) * network(x, float(t))) / math.sqrt(a))
        mean = betas[t] * math.sqrt(b) / (1 - a) * x0 + (1 - b) * math.sqrt(1 - betas[t]) / (1 - a) * x
        variance = betas[t] * (1 - b) / (1 - a)
        x = mean + (math.sqrt(variance) * temperature * noise(number) if t else 0)
    return x


def run(name: str, grid: list[Level], **options: Any) -> Tensor:
    sampler: Any = sampler_by_name(name, **options)
    return sampler.with_codebook(codes)(denoise, noise(99), grid, noise=noise)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("method", "steps"), [("official", 20), ("quad", 20), ("quad", 7), ("quad", 60)])
@pytest.mark.parametrize(("eta", "temperature"), [(0.0, 1.0), (1.0, 1.0), (1.0, 0.6), (0.5, 0.0), (0.4, 1.3)])
def test_ddim(method: str, steps: int, eta: float, temperature: float, quantize: bool) -> None:
    found = run("ddim", ddim_grid(SCHEDULE, steps, method), eta=eta, temperature=temperature, quantize_x0=quantize)
    expected = official_ddim(official_times(method, steps), eta, temperature, codes if quantize else as_it_is)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize(("method", "steps"), [("official", 20), ("quad", 20), ("quad", 60)])
def test_plms(method: str, steps: int, quantize: bool) -> None:
    found = run("plms", ddim_grid(SCHEDULE, steps, method), quantize_x0=quantize)
    expected = official_plms(official_times(method, steps), codes if quantize else as_it_is)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ddpm(temperature: float, quantize: bool) -> None:
    found = run("ddpm", ddim_grid(SCHEDULE, SCHEDULE.steps, "linspace"), temperature=temperature, quantize_x0=quantize)
    torch.testing.assert_close(found, official_ddpm(temperature, codes if quantize else as_it_is), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 200, 999])
def test_quadratic_times(steps: int) -> None:
    grid = ddim_grid(SCHEDULE, steps, "quad")
    assert [level.time for level in grid] == [*map(float, official_times("quad", steps)[::-1]), None]
    assert grid[-1][:2] == ddim_grid(SCHEDULE, 50)[-1][:2]


def test_quadratic_times_that_leave_the_table() -> None:
    with pytest.raises(InputError, match="spacing=quad leaves the 4 noise levels"):
        ddim_grid(Schedule(steps=4), 3, "quad")


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in ("ode", "sde")])  # which are for flows
def test_every_sampler_takes_a_grid_that_repeats_levels(name: str) -> None:
    grid = ddim_grid(SCHEDULE, 100, "quad")
    assert len({level.time for level in grid}) < len(grid)
    x = sampler_by_name(name).along(SCHEDULE)(denoise, noise(99), grid, noise=noise)
    assert x.isfinite().all()


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler_ancestral"])
def test_a_temperature_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(InputError, match=r"temperature=.* is not a finite number of 0 or more"):
        sampler_by_name(name, temperature=value)


SIZES: dict[str, Any] = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}


def test_codes_are_those_of_the_first_stage() -> None:
    """Raw latents are quantised, whatever the latent scale; what is quantised already stays."""
    torch.manual_seed(0)
    space = LatentSpace(VQModel(latent_channels=3, codebook_size=5, **SIZES), LatentScale(std=0.3, shift=0.1))
    found = space.quantised(torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert found.dtype == torch.float64
    vectors = (found * 0.3 + 0.1).movedim(1, -1).reshape(-1, 3).float()
    book = space.first_stage.quantiser.codebook.weight  # type: ignore[union-attr]
    distances = (vectors[:, None] - book).abs().amax(2)  # type: ignore[operator]
    assert float(distances.amin(1).max()) < 1e-5
    torch.testing.assert_close(space.quantised(found), found, rtol=1e-6, atol=1e-6)


def test_a_first_stage_without_codes_is_refused() -> None:
    space = LatentSpace(KLAutoencoder(latent_channels=3, **SIZES), LatentScale())
    with pytest.raises(InputError, match="quantize_x0=true: the first stage KLAutoencoder has no codebook"):
        space.quantised(torch.zeros(SHAPE))
    with pytest.raises(InputError, match="needs a first stage with a codebook"):
        sampler_by_name("ddim", quantize_x0=True)(denoise, noise(0), ddim_grid(SCHEDULE, 2), noise=noise)


def dpm_2_ancestral(x: Tensor, sigmas: list[float], eta: float, noise_after_euler: bool) -> Tensor:
    """k-diffusion's sample_dpm_2_ancestral on data N(0, 0.5^2); it adds no noise after a step down to sigma 0."""
    for number, (here, there) in enumerate(pairwise(sigmas)):
        up = min(there, eta * math.sqrt(there**2 * (here**2 - there**2) / here**2))
        down, slope = math.sqrt(there**2 - up**2), x * here / (here**2 + 0.25)
        if down > 0:
            halfway = math.sqrt(here * down)
            slope = (x + slope * (halfway - here)) * halfway / (halfway**2 + 0.25)
        x = x + slope * (down - here)
        if down > 0 or noise_after_euler:
            x = x + up * noise(number)
    return x


@pytest.mark.parametrize("eta", [0.7, 1.0, 1.3, 2.5])
def test_dpm_2_adds_the_noise_of_every_ancestral_step(eta: float) -> None:
    """Deviation after 25 steps with eta 2.5 as in docs/samplers.md: 0.32 of 0.5, in k-diffusion 0."""
    sigmas = [*np.geomspace(80.0, 0.002, 25).tolist(), 0.0]
    grid, x = [Level(1.0, sigma, sigma) for sigma in sigmas], noise(99) * 80
    sampler: Any = sampler_by_name("dpm_2", eta=eta)
    sampler = sampler.along(EdmPath(1e-4, 1e4))
    found = sampler(lambda x, level: x * 0.25 / (level.sigma**2 + 0.25), x, grid, noise=noise)
    torch.testing.assert_close(found, dpm_2_ancestral(x, sigmas, eta, True), rtol=1e-9, atol=1e-9)  # float64
    official = dpm_2_ancestral(x, sigmas, eta, False)
    if eta == 2.5:  # every step goes down to 0
        assert official.abs().max() < 1e-9
        assert 0.2 < float(found.std()) < 0.45  # 96 numbers of deviation 0.32
    elif eta <= 1:
        torch.testing.assert_close(found, official, rtol=1e-9, atol=1e-9)
