"""Tables of DiT's processes, SiT's paths, their diffusions and conversions, LightningDiT's statistics of latents."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.data.latent_shards import Statistics
from ldmlab.diffusion.diffusion_loss import step_variances
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import Parameterization, ScorePrediction, VelocityPrediction
from ldmlab.diffusion.paths import ContinuousPath, CosinePath, LinearPath, VariancePreservingPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.samplers._stepwise import noise_of, posterior_variance
from ldmlab.samplers.ode import slope
from ldmlab.samplers.sde import Sde
from modern_cases import assert_near, field, recorded

DIT, DIT_CASES = recorded("dit/schedules")
EXACT = 1e-7  # of float64 tables


@pytest.mark.parametrize("case", [case for case in DIT_CASES if case.startswith("betas")])
def test_betas_of_dit(case: str) -> None:
    """The ends of the linear schedule grow as steps get fewer."""
    one = DIT_CASES[case]
    scale = 1000 / one["steps"]
    linear = Schedule("linear", scale * 0.0001, scale * 0.02, one["steps"])
    found = linear if one["schedule"] == "linear" else Schedule("cosine", steps=one["steps"])
    assert_near(found.betas, DIT[case], EXACT)


@pytest.mark.parametrize("case", [case for case in DIT_CASES if case.startswith("timestep_map")])
def test_times_that_dit_visits(case: str) -> None:
    respacing, expected = DIT_CASES[case]["timestep_respacing"], DIT[case].tolist()
    spacings = ["leading"] if respacing.startswith("ddim") else [f"linspace:{respacing or 1000}"]
    for spacing in spacings if "," in respacing or spacings == ["leading"] else [*spacings, "linspace"]:
        grid = Schedule().grid(len(expected), spacing)
        assert [level.time for level in grid[-2::-1]] == expected


@pytest.mark.parametrize(("count", "stride"), [(25, 40), (30, 34), (63, 16), (334, 3)])
def test_strides_of_dit_that_do_not_divide_the_levels(count: int, stride: int) -> None:
    """Its "ddimN": the smallest stride by which the range of all times has N."""
    strides = (k for k in range(1, 1000) if len(range(0, 1000, k)) == count)
    assert next(strides) == stride
    grid = Schedule().grid(count, "leading:exact")
    assert [level.time for level in grid[-2::-1]] == [*range(0, 1000, stride)]


def test_sections_that_do_not_fit_are_refused() -> None:
    for text, steps in (("10,15,20", 50), ("10,x", 10), ("5,0", 5), ("", 5), ("-3,8", 5)):
        with pytest.raises(InputError, match=rf"spacing=linspace:{text} with steps={steps}: give a count of 1 or more"):
            Schedule().grid(steps, f"linspace:{text}")
    with pytest.raises(InputError, match="a section of 3 noise levels has no 4 of them"):
        Schedule(steps=10).grid(6, "linspace:1,1,4")
    with pytest.raises(InputError, match="leading:exact: no stride gives 501 of 1000"):
        Schedule().grid(501, "leading:exact")
    with pytest.raises(InputError, match="has no such power"):
        LinearPath().grid(10, "linspace:5,5")


@pytest.mark.parametrize("case", [case for case in DIT_CASES if case.startswith("respaced")])
def test_tables_of_a_respaced_process(case: str) -> None:
    """Of the levels that it visits: betas, and the posterior's mean and variance of each step."""
    schedule = Schedule("linear", 0.0001, 0.02)
    times = DIT[f"timestep_map.{DIT_CASES[case]['timestep_respacing']}"]
    chosen = SimpleNamespace(steps=len(times), alpha_bar=schedule.alpha_bar[times])
    chosen.levels = lambda t: schedule.levels(times[t])
    low, log_beta, from_clean, _, _ = step_variances(chosen)  # type: ignore[arg-type]
    grid = [*(schedule.level(float(t)) for t in times.flip(0)), schedule.grid(1)[-1]._replace(alpha=1.0, sigma=0.0)]
    steps = list(pairwise(grid))[::-1]
    from_x = [here.alpha / there.alpha * there.sigma**2 / here.sigma**2 for here, there in steps]
    variances = [posterior_variance(here, there) for here, there in steps]
    assert_near(chosen.alpha_bar, DIT[f"{case}.alphas_cumprod"], EXACT)
    assert_near(log_beta.exp(), DIT[f"{case}.betas"], EXACT)
    assert_near(low, DIT[f"{case}.posterior_log_variance_clipped"], EXACT)
    assert_near(from_clean, DIT[f"{case}.posterior_mean_coef1"], EXACT)
    assert_near(torch.tensor(from_x, dtype=torch.float64), DIT[f"{case}.posterior_mean_coef2"], EXACT)
    assert_near(torch.tensor(variances, dtype=torch.float64), DIT[f"{case}.posterior_variance"], EXACT)


SIT, _ = recorded("sit/paths")
PATHS: dict[str, ContinuousPath] = {
    "Linear": LinearPath(1.0, 0.0),
    "GVP": CosinePath(1.0, 0.0),
    "VP": VariancePreservingPath(1.0, 0.0, margins=(0.0, 0.0)),
}
FORMS = {"SBDM": "sbdm", "inccreasing-decreasing": "increasing_decreasing"}


@pytest.mark.parametrize("norm", [0.5, 1.0])
@pytest.mark.parametrize("form", ["constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing"])
@pytest.mark.parametrize("kind", PATHS)
def test_diffusions_of_sit(kind: str, form: str, norm: float) -> None:
    path = PATHS[kind]
    sampler: Any = sampler_by_name("sde", form=FORMS.get(form, form), norm=norm)
    levels = [path.level(float(t)) for t in SIT["t"].double()]
    found = torch.tensor([sampler.along(path).diffusion(level) for level in levels])
    assert_near(found, SIT[f"{kind}.diffusion.{form}.{norm}"])


@pytest.mark.parametrize("kind", PATHS)
def test_conversions_of_sit(kind: str) -> None:
    """From a velocity the noise and the score, from a score the velocity; the forward drift and diffusion."""
    path, sde = PATHS[kind], Sde(form="sbdm").along(PATHS[kind])
    velocity, score = (Parameterization(p, path) for p in (VelocityPrediction("data"), ScorePrediction()))
    found: dict[str, list[Tensor]] = {}
    for x, v, t in zip(SIT["x"], SIT["v"], SIT["t"].double(), strict=True):
        level = path.level(float(t))
        noise = noise_of(x.double(), velocity.clean(x, v, level), level)
        to_noise = slope(partial(of_score, score, v), path, x.double(), path.position(t))
        d_alpha, _ = path.rates(t[None])
        parts = {"noise": noise, "score": -noise / level.sigma, "velocity": -to_noise}
        parts |= {"drift": d_alpha[0, 0] / level.alpha * x, "diffusion": torch.tensor(sde.diffusion(level))}
        for name, part in parts.items():
            found.setdefault(name, []).append(part)
    for name, theirs in (
        ("noise", "noise_from_velocity"),
        ("score", "score_from_velocity"),
        ("velocity", "velocity_from_score"),
        ("drift", "drift"),
        ("diffusion", "drift_diffusion"),
    ):
        assert_near(torch.stack(found[name]), SIT[f"{kind}.{theirs}"])


def of_score(form: Parameterization, score: Tensor, x: Tensor, level: Level) -> Tensor:
    return form.clean(x, score, level)


@pytest.mark.parametrize("kind", PATHS)
def test_intervals_of_sit(kind: str) -> None:
    """Of velocities by default, those of noises and scores by `margins`."""
    _, cases = recorded("sit/paths")
    for predicted in ("velocity", "noise", "score"):
        start, end = cases["intervals"][f"{kind}.{predicted}"]["train"]
        path = type(PATHS[kind])(
            1.0, 0.0, **({} if (start, end) == (0, 1) or kind == "VP" else {"margins": (0.001,) * 2})
        )
        times = path.quantile(torch.tensor([0.0, 1.0], dtype=torch.float64))
        assert times.tolist() == pytest.approx([end, start], abs=1e-7)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_score_of_repa(kind: str) -> None:
    tensors, _ = recorded("repa/samplers")
    path = (CosinePath if kind == "cosine" else LinearPath)(0.0, 1.0)
    form, x, t = Parameterization(VelocityPrediction(), path), tensors["score.x"], tensors["score.t"]
    levels = [path.level(float(time.double())) for time in t]
    noises = [noise_of(x[i], form.clean(x[i], field(x, t)[i], level), level) for i, level in enumerate(levels)]
    found = [-noise / level.sigma for noise, level in zip(noises, levels, strict=True)]
    assert_near(torch.stack(found), tensors[f"score.{kind}"])


def test_statistics_of_lightningdits_latents() -> None:
    tensors, _ = recorded("lightningdit/latents")
    latents = tensors["latents"]
    scale = LatentScale(*(tensors[name].flatten().tolist() for name in ("std", "mean")))
    assert_near(scale.normalise(latents), tensors["normalised"])
    assert_near(scale.denormalise(tensors["normalised"]), tensors["denormalised"])
    measured = Statistics()
    for latent in latents.numpy():
        measured.add_moments(latent[None], len(latent))
    statistics = measured.summary()
    assert_near(torch.tensor(statistics["mean"]), tensors["mean"].flatten())
    count = latents[:, 0].numel()  # theirs divides by one less
    assert_near(torch.tensor(statistics["std"]) * (count / (count - 1)) ** 0.5, tensors["std"].flatten())


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0])
def test_times_of_lightningdits_steps(shift: float) -> None:
    """Its shift is of times that run to the data; 0 is none."""
    tensors, _ = recorded("lightningdit/transport")
    grid = LinearPath(1.0, 0.0).with_shift(1 / (shift or 1.0)).grid(10)
    found = torch.tensor([level.time for level in grid[:-1]], dtype=torch.float64)
    assert_near(found, tensors[f"ode.euler.11.shift={shift}.times"])
