"""Guidance on mixtures of Gaussians with known scores: every objective, prediction and sampler reaches the exact end.

A network that is exact for its prediction stands in `LatentDiffusion`. Between classes of one variance the guided score
is again that of a Gaussian at every level, so the end of the flow and the distribution of noisy samplers are known; for
a weak model with a broader score the flow is linear, and its end known too.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning, Level
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import (
    CleanPrediction,
    EdmPrediction,
    EpsPrediction,
    ScorePrediction,
    VelocityPrediction,
    VPrediction,
)
from ldmlab.diffusion.paths import ContinuousPath, CosinePath, EdmPath, LinearPath, VariancePreservingPath
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.sample_settings import SAMPLERS, sampler_by_name
from ldmlab.randomness import normal

Clean = Callable[[Tensor, float, float, Tensor], Tensor]  # x (B, C, 1, 1) float64, alpha, sigma, class (B,) => E[clean]
MEANS, STD, NULL = torch.tensor([-1.0, 0.7], dtype=torch.float64), 0.5, 0.2  # of two classes; of no class
SCALE = 2.5


def of_gaussians(x: Tensor, alpha: float, sigma: float, number: Tensor, std: float = STD) -> Tensor:
    """Of class 0 or 1, or of no class, -1, all of one variance."""
    mean = torch.where(number < 0, NULL, MEANS[number.clamp(min=0)])[:, None, None, None]
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (x - alpha * mean)


class Exact(nn.Module):
    """The output of a network that predicts as `prediction` says and knows the clean estimate."""

    accepts = frozenset({"vector"})

    def __init__(self, path: ContinuousPath, prediction: Any, clean: Clean) -> None:
        super().__init__()
        self.path, self.prediction, self.clean = path, prediction, clean

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        level, kind = self.path.level(float(t[0].double())), self.prediction
        alpha, sigma = level.alpha, level.sigma
        if isinstance(kind, EdmPrediction):  # its network sees c_in x
            x = x * math.hypot(alpha * kind.sigma_data, sigma)
        assert conditioning.vector is not None
        clean = self.clean(x.double(), alpha, sigma, conditioning.vector[:, 0].long())
        noise = (x.double() - alpha * clean) / sigma
        inputs = (clean, noise, *(torch.tensor(v, dtype=torch.float64) for v in (alpha, sigma)))
        rates = [self.path.rates(t[:1].double())] if getattr(kind, "uses_rates", False) else []
        output = -noise / sigma if isinstance(kind, ScorePrediction) else kind.target(*inputs, *rates)
        return output.reshape(x.shape)


PATHS: dict[str, ContinuousPath] = {
    "linear": LinearPath(0.0, 1.0),
    "cosine": CosinePath(1.0, 0.0),
    "vp": VariancePreservingPath(0.0, 1000.0),
    "edm": EdmPath(0.02, 40.0),
}
OBJECTIVES: dict[str, tuple[str, Any]] = {
    "eps": ("vp", EpsPrediction()),
    "clean": ("cosine", CleanPrediction()),
    "v": ("cosine", VPrediction()),
    "velocity to noise": ("linear", VelocityPrediction()),
    "velocity to data": ("cosine", VelocityPrediction("data")),
    "score": ("vp", ScorePrediction()),
    "edm": ("edm", EdmPrediction(0.6)),
}


def model(objective: str, clean: Clean = of_gaussians) -> LatentDiffusion:
    name, prediction = OBJECTIVES[objective]
    network = Exact(PATHS[name], prediction, clean)
    return LatentDiffusion(
        Identity(), LatentScale(), network, {}, PATHS[name], prediction, guidance_trained=True
    ).eval()


def of_class(number: int, count: int) -> Conditioning:
    return Conditioning(vector=torch.full((count, 1), float(number)))


def grid(path: ContinuousPath, steps: int, first: float = 0.9, last: float = 0.1) -> list[Level]:
    """Even steps between two positions, where no step meets an end of the path."""
    s = torch.linspace(first, last, steps + 1, dtype=torch.float64)
    levels = [path.level(float(time)) for time in path.time(s)]
    return [*levels[:-1], levels[-1]]


def end_of(x: Tensor, here: Level, there: Level, parts: Sequence[tuple[float, float, float]]) -> Tensor:
    """Where the flow of sum_i w_i score_i of Gaussians (w, mean, std) takes x, the w summing to 1.

    With z = x / alpha and r = sigma / alpha: dz / dr = sum_i w_i r (z - m_i) / (v_i + r^2), linear in z; of one mean
    or of one variance it is z = m + (z_0 - m) prod_i ((v_i + r^2) / (v_i + r_0^2))^(w_i / 2), m = sum_i w_i m_i.
    """
    first, last = here.sigma / here.alpha, there.sigma / there.alpha
    mean = sum(w * m for w, m, _ in parts)
    factor = math.prod(((s**2 + last**2) / (s**2 + first**2)) ** (w / 2) for w, _, s in parts)
    return there.alpha * (mean + (x / here.alpha - mean) * factor)


def guided(number: int) -> list[tuple[float, float, float]]:
    return [(SCALE, float(MEANS[number]), STD), (1 - SCALE, NULL, STD)]


def points(level: Level) -> Tensor:
    return torch.linspace(-1.5, 1.5, 9, dtype=torch.float64)[:, None, None, None] * math.hypot(level.alpha, level.sigma)


def run(made: LatentDiffusion, sampler: Any, x: Tensor, levels: list[Level], guidance: Guidance, number: int) -> Tensor:
    """A guided run for a class, whose weak output is that of no class, or of the weak model for the class."""
    other = of_class(-1 if guidance.weak is None else number, len(x))
    denoise = made.denoiser(of_class(number, len(x)), other, guidance)
    draw = lambda step: normal(1, "sample", torch.arange(len(x)), tuple(x.shape[1:]), step=step + 1).double()  # noqa: E731
    return sampler.along(made.path)(denoise, x, levels, noise=draw)


EXACT = [name for name in SAMPLERS if name not in ("ode", "dpm_adaptive") and sampler_by_name(name).order is not None]  # type: ignore
COUNTS = (21, 42, 84)  # dpm_fast ends with steps of the same orders
SMALL = 2e-4  # below, errors change their sign or are the rounding of float32 outputs


def errors_of(
    sampler: Any, made: LatentDiffusion, guidance: Guidance, end: Callable[[Tensor, list[Level]], Tensor]
) -> list[float]:
    """The largest error of class 1 for each number of steps."""
    found = []
    for steps in COUNTS:
        levels = grid(made.path, steps)  # type: ignore[arg-type]
        x = points(levels[0])
        found.append(float((run(made, sampler, x, levels, guidance, 1) - end(x, levels)).abs().max()))
    return found


def check_order(errors: Sequence[float], order: float) -> None:
    """Over two doublings; of second order where it is more, since the first steps of multistep samplers are lower."""
    assert errors[-1] < 0.03, errors
    assert errors[-1] < SMALL or math.log2(errors[0] / errors[-1]) / 2 > min(order, 2) - 0.4, errors


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", EXACT)
def test_classifier_free_guidance_reaches_its_end_within_the_order(name: str, objective: str) -> None:
    made, sampler = model(objective), sampler_by_name(name)
    end = lambda x, levels: end_of(x, levels[0], levels[-1], guided(1))  # noqa: E731
    check_order(errors_of(sampler, made, Guidance(SCALE), end), sampler.order)  # type: ignore[attr-defined]


def broader(x: Tensor, alpha: float, sigma: float, number: Tensor) -> Tensor:
    """A weak model: the score of the classes with noise added to the data."""
    return of_gaussians(x, alpha, sigma, number, 1.0)


@pytest.mark.parametrize("objective", ["velocity to noise", "edm", "eps"])
@pytest.mark.parametrize("name", EXACT)
def test_autoguidance_reaches_its_end_within_the_order(name: str, objective: str) -> None:
    mean, sampler = float(MEANS[1]), sampler_by_name(name)
    guidance = Guidance(1.8, weak=model(objective, broader))
    parts = [(1.8, mean, STD), (-0.8, mean, 1.0)]
    end = lambda x, levels: end_of(x, levels[0], levels[-1], parts)  # noqa: E731
    check_order(errors_of(sampler, model(objective), guidance, end), sampler.order)  # type: ignore[attr-defined]


@pytest.mark.parametrize("objective", ["velocity to noise", "v", "edm"])
@pytest.mark.parametrize("name", [*EXACT, "ode:method=heun2"])
def test_an_interval_between_levels_of_the_grid_keeps_the_order(name: str, objective: str) -> None:
    """Guided from a third to two thirds of the steps, its first level inside, its last one not."""
    made, sampler, errors = model(objective), sampler_by_name(name), []
    for steps in COUNTS:
        levels = grid(made.path, steps)  # type: ignore[arg-type]
        x, inner = points(levels[0]), (levels[steps // 3], levels[2 * steps // 3])
        at = [float(made.path.position(torch.tensor([level.time], dtype=torch.float64))) for level in inner]
        guidance = Guidance(SCALE, (at[1] + 1e-5, at[0]))
        plain = [(1.0, float(MEANS[1]), STD)]
        end = x
        for (here, there), parts in zip(
            itertools.pairwise((levels[0], *inner, levels[-1])), (plain, guided(1), plain), strict=True
        ):
            end = end_of(end, here, there, parts)
        errors.append(float((run(made, sampler, x, levels, guidance, 1) - end).abs().max()))
    steps_alone = name in ("ddim", "euler", "heun", "dpm_2", "ode:method=heun2")
    if steps_alone:  # no memory of estimates before the bound
        check_order(errors, sampler.order)  # type: ignore[attr-defined]
    assert errors[-1] < 0.03


@pytest.mark.parametrize("tolerance", [1e-3, 1e-5])
@pytest.mark.parametrize("name", ["ode", "dpm_adaptive"])
def test_adaptive_samplers_reach_the_guided_end_within_their_tolerance(name: str, tolerance: float) -> None:
    made, sampler = model("velocity to noise"), sampler_by_name(name, rtol=tolerance, atol=tolerance)
    levels = grid(made.path, 1)  # type: ignore[arg-type]
    x = points(levels[0])
    found = run(made, sampler, x, levels, Guidance(SCALE), 1)
    assert float((found - end_of(x, levels[0], levels[-1], guided(1))).abs().max()) < 20 * tolerance


ONE_STEP = ("consistency",)  # needs a network that knows the end of the flow at once
NOISY = [name for name in SAMPLERS if name not in ONE_STEP and sampler_by_name(name).order is None]  # type: ignore


@pytest.mark.parametrize("objective", ["velocity to noise", "v", "edm"])
@pytest.mark.parametrize("name", NOISY)
def test_samplers_that_draw_noise_have_the_guided_distribution(name: str, objective: str) -> None:
    """A Gaussian around s m + (1 - s) m_none at every level; standard errors of 2,000 draws: 0.012 and 0.008."""
    made, mean = model(objective), sum(w * m for w, m, _ in guided(1))
    levels = grid(made.path, 100, 0.95, 0.02)  # type: ignore[arg-type]
    first, last = levels[0], levels[-1]
    spread = lambda level: math.hypot(level.alpha * STD, level.sigma)  # noqa: E731
    x = first.alpha * mean + spread(first) * normal(0, "start", torch.arange(2000), (1, 1, 1)).double()
    found = run(made, sampler_by_name(name), x, levels, Guidance(SCALE), 1)
    assert float(found.mean()) == pytest.approx(last.alpha * mean, abs=0.05)
    assert float(found.std()) == pytest.approx(spread(last), abs=0.04)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ode"] + ["ode:method=rk4", "ode"])
def test_the_interval_of_the_whole_path_is_plain_guidance_bit_for_bit(name: str) -> None:
    """Also where churn and adaptive steps leave the path at its ends."""
    made, sampler = model("edm"), sampler_by_name(name)
    levels = grid(made.path, 12, 1.0, 0.05)  # type: ignore[arg-type]
    x = points(levels[0])
    runs = [run(made, sampler, x, levels, Guidance(SCALE, interval), 1) for interval in (None, (0, 1), (0.0, 0.5))]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("name", EXACT)
def test_channels_that_are_not_guided_end_as_without_guidance(name: str) -> None:
    made, sampler = model("velocity to data"), sampler_by_name(name)
    levels = grid(made.path, 84)  # type: ignore[arg-type]
    x = points(levels[0]).repeat(1, 3, 1, 1)
    found = run(made, sampler, x, levels, Guidance(SCALE, channels=2), 1)
    ends = [end_of(x[:, :1], levels[0], levels[-1], parts) for parts in (guided(1), [(1.0, float(MEANS[1]), STD)])]
    expected = torch.cat([ends[0], ends[0], ends[1]], dim=1)
    assert float((found - expected).abs().max()) < 0.03
    assert float((ends[0] - ends[1]).abs().min()) > 0.3


def test_rescaled_guidance_reaches_the_end_of_its_equation() -> None:
    """Of noise estimates whose deviation is put right, by the classical Runge-Kutta method with its own formulas."""
    made, weak, phi, number = model("eps"), model("eps", broader), 0.7, torch.ones(9, dtype=torch.int64)

    def slope(x: Tensor, s: Tensor) -> Tensor:
        (alpha, sigma), (d_alpha, d_sigma) = PATHS["vp"].curve(s), PATHS["vp"].slopes(s)
        cleans = (known(x, float(alpha), float(sigma), number) for known in (of_gaussians, broader))
        eps, without = ((x - alpha * clean) / sigma for clean in cleans)
        guided = without + SCALE * (eps - without)
        ratio = (eps.flatten(1).std(1) / guided.flatten(1).std(1))[:, None, None, None]
        guided = phi * ratio * guided + (1 - phi) * guided
        return d_alpha * (x - sigma * guided) / alpha + d_sigma * guided

    channels = torch.tensor([[1.0, -0.4, 0.3, 0.8], [0.3, -0.2, 0.1, 0.5]], dtype=torch.float64)[:, None, :, None, None]
    x = points(grid(PATHS["vp"], 1)[0]) * channels[0] + channels[1]
    end, h = x, torch.tensor(-0.8 / 400, dtype=torch.float64)
    for step in range(400):
        s = 0.9 + step * h
        k1 = slope(end, s)
        k2 = slope(end + h / 2 * k1, s + h / 2)
        k3 = slope(end + h / 2 * k2, s + h / 2)
        end = end + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(end + h * k3, s + h))

    def error(steps: int, rescale: float) -> float:
        guidance = Guidance(SCALE, rescale=rescale, weak=weak)
        found = run(made, sampler_by_name("heun"), x, grid(PATHS["vp"], steps), guidance, 1)
        return float((found - end).abs().max())

    check_order([error(steps, phi) for steps in COUNTS], 2)
    assert error(COUNTS[-1], 0.0) > 0.05


# ---- a class that is lost

PLACES = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [1.6, 0.0]], dtype=torch.float64)  # of three classes in two dimensions
WIDTH, BLUR = 0.25, 0.5


def of_places(x: Tensor, alpha: float, sigma: float, number: Tensor, width: float = WIDTH) -> Tensor:
    """E[clean] of a condition that holds the first two classes, or of all three, -1; x (B, 2, 1, 1)."""
    variance = alpha**2 * width**2 + sigma**2
    away = x.flatten(1)[:, None] - alpha * PLACES
    logits = -away.square().sum(2) / (2 * variance)
    logits[(number >= 0), 2] = -math.inf
    each = PLACES + alpha * width**2 / variance * away  # (B, 3, 2)
    return (logits.softmax(1)[:, :, None] * each).sum(1)[:, :, None, None]


def blurred(x: Tensor, alpha: float, sigma: float, number: Tensor) -> Tensor:
    return of_places(x, alpha, sigma, number, math.hypot(WIDTH, BLUR))


@pytest.mark.parametrize("objective", ["velocity to noise", "edm"])
def test_no_class_is_lost_under_autoguidance_where_plain_guidance_loses_it(objective: str) -> None:
    """The condition's second class has a neighbour of another condition, from which plain guidance pushes all away."""
    made = model(objective, of_places)
    levels = grid(made.path, 60, 0.98, 0.02)  # type: ignore[arg-type]
    x = math.hypot(levels[0].alpha, levels[0].sigma) * normal(0, "start", torch.arange(1000), (2, 1, 1)).double()
    shares, near = [], []
    for guidance in (Guidance(1.0), Guidance(6.0), Guidance(6.0, weak=model(objective, blurred))):
        end = run(made, sampler_by_name("heun"), x, levels, guidance, 0).flatten(1) / levels[-1].alpha
        distance = torch.cdist(end, PLACES[:2])
        shares.append(float((distance.argmin(1) == 1).double().mean()))
        near.append(float((distance.amin(1) < 3 * WIDTH).double().mean()))
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert shares[1] < 0.02  # plain guidance: all but lost
    assert shares[2] == pytest.approx(0.5, abs=0.05)
    assert near[2] > 0.99
