"""Schedules from outside: sampling uses the levels that training used, whatever alpha_bar says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.contracts import Level
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction, VPrediction
from ldmlab.diffusion.respacing import SPACINGS
from ldmlab.diffusion.schedule import Schedule, ddim_grid, levels_of, signal_to_noise
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.sample_settings import sampler_by_name

SPREAD = 0.1  # deviation of the toy data, whose mean is 2


class Flow:
    """x = (1 - s) clean + s noise at s = (t + 1) / (T + 1), or from s = 0; alpha_bar is alpha^2."""

    def __init__(self, steps: int = 1000, from_clean: bool = False) -> None:
        self.steps = steps
        self.s = (torch.arange(steps).double() + (0 if from_clean else 1)) / (steps + (0 if from_clean else 1))
        self.alpha_bar = (1 - self.s) ** 2

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self.s[t].float()[:, None, None, None]
        return 1 - s, s


class Rotated(Flow):
    """Not of unit radius either, and without an alpha_bar."""

    def __init__(self) -> None:
        super().__init__()
        del self.alpha_bar

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.s[t].float()[:, None, None, None] * math.pi / 2
        return 2 * angle.cos(), 2 * angle.sin()


def exact(x: Tensor, level: Level) -> Tensor:
    """E[clean | x] for clean ~ N(2, SPREAD^2)."""
    gain = level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2)
    return 2 + gain * (x - 2 * level.alpha)


@pytest.mark.parametrize("schedule", [Flow(), Flow(from_clean=True), Rotated()], ids=["flow", "from clean", "radius 2"])
@pytest.mark.parametrize(("sampler", "steps"), [("euler", 250), ("heun", 200), ("ddim", 250), ("dpmpp_2m", 200)])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_an_exact_network_gives_the_data(schedule: Any, sampler: str, steps: int, spacing: str) -> None:
    infinite = float(levels_of(schedule).sigma[0]) == 0
    if infinite and spacing in ("karras", "log_snr", "polyexponential"):
        with pytest.raises(InputError, match="without noise at its end"):
            ddim_grid(schedule, steps, spacing)
        return
    grid = ddim_grid(schedule, 250 if spacing == "official" else steps, spacing)
    for level in grid[:-1]:
        assert level.time is not None
        if level.time == int(level.time):
            alpha, sigma = schedule.levels(torch.tensor([int(level.time)]))
            assert (level.alpha, level.sigma) == pytest.approx((float(alpha), float(sigma)), rel=1e-5, abs=1e-6)
    quantiles = torch.special.ndtri((torch.arange(999, dtype=torch.float64) + 0.5) / 999)
    start = 2 * grid[0].alpha + math.hypot(grid[0].alpha * SPREAD, grid[0].sigma) * quantiles
    x = sampler_by_name(sampler)(exact, start, grid, noise=torch.zeros_like)  # type: ignore[arg-type]
    end = grid[-1]
    spread = math.hypot(end.alpha * SPREAD, end.sigma)
    assert float(x.mean()) == pytest.approx(2 * end.alpha, rel=5e-3)
    assert float(x.std()) == pytest.approx(spread, rel=0.15)


def test_levels_of_ours_keep_the_digits_of_alpha_bar() -> None:
    schedule = Schedule()
    found = levels_of(schedule)
    assert torch.equal(found.alpha, schedule.alpha_bar.sqrt())
    assert torch.equal(found.sigma, (1 - schedule.alpha_bar).sqrt())


def test_signal_is_that_of_the_levels() -> None:
    flow = Flow()
    torch.testing.assert_close(signal_to_noise(flow, 0.5), 0.5 * ((1 - flow.s) / flow.s) ** 2, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("level", [Level(0.5, 0.5, 3.0), Level(1.2, 1.6, 3.0), Level(0.6, 0.8, 3.0)])
@pytest.mark.parametrize("prediction", [EpsPrediction(), VPrediction()])
def test_predictions_invert_on_any_level(level: Level, prediction: Any) -> None:
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (torch.full((1, 1, 1, 1), value) for value in level[:2])
    target = prediction.target(clean, noise, alpha, sigma)
    found = prediction.clean(level.alpha * clean + level.sigma * noise, target, level)
    torch.testing.assert_close(found.float(), clean, rtol=1e-5, atol=1e-5)


class Net(nn.Module):
    """Channels out per channel in."""

    accepts: frozenset[str] = frozenset()

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        self.times = times

    def prepare(self, conditioning: Any) -> Any:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        return x.repeat(1, self.times, 1, 1)


def model(schedule: Any, times: int = 1) -> LatentDiffusion:
    return LatentDiffusion(Identity(), LatentScale(), Net(times), {}, schedule, EpsPrediction())


class Levels:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


@pytest.mark.parametrize(
    ("schedule", "sentence"),
    [
        (Levels(), "has no steps and no levels"),
        (Levels(steps=10), "has no levels"),
        (Levels(levels=lambda t: (t, t)), "has no steps"),
        (Levels(steps=10, levels=lambda t: (t, t)), "alpha and sigma, each of shape"),
        (Levels(steps=10, levels=lambda t: (t[:, None, None, None],) * 3), "alpha and sigma, each of shape"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=f"diffusion.schedule=Levels.*{sentence}"):
        model(schedule)


def test_learned_variances_are_refused() -> None:
    batch = {"position": torch.arange(2), "image": torch.zeros(2, 3, 4, 4, dtype=torch.uint8)}
    network = model(Schedule(), times=2)
    with pytest.raises(InputError, match=r"\(3, 4, 4\) into \(6, 4, 4\).*prediction=LearnedVariance"):
        network.loss(batch, seed=0)
    with pytest.raises(InputError, match="learned variance"):
        network.sample(
            {}, sampler=sampler_by_name("ddim"), grid=ddim_grid(Schedule(), 2), index=torch.arange(1), size=(4, 4)
        )
    assert model(Flow()).loss(batch, seed=0)[0].shape == (2,)
