"""Chains of DiT and SiT outside their usual settings: clipped estimates, inversion, bounds, flows back and guided."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import EpsPrediction, Parameterization, VelocityPrediction
from ldmlab.diffusion.paths import ContinuousPath, CosinePath, LinearPath, VariancePreservingPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.inference.likelihood import variational_bound
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.samplers._stepwise import noise_of
from modern_cases import assert_near, drawn_noise, field, recorded

DIT, DIT_CASES = recorded("dit/trajectories")


def by_number(like: Tensor) -> Callable[[int], Tensor]:
    return lambda step: drawn_noise(f"noise.{step + 1}", *like.shape)


def levels_of(schedule: Schedule, respacing: str) -> list[Level]:
    """Of DiT's respacing, and the end."""
    return schedule.grid(sum(int(count) for count in respacing.split(",")), f"linspace:{respacing}")


def dit_network(learned: list[Tensor], *, clip: bool = False, at: list[Tensor] | None = None) -> Any:
    """The clean estimate of the stand-in, which is kept in `at`, and its learned variance."""

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        learned[:] = [0.6 * torch.sin(3 * x + 2 * level.time / 1000)]
        clean = EpsPrediction().clean(x, field(x, level.time / 1000), level)
        clean = clean.clamp(-1, 1) if clip else clean
        if at is not None:
            at.extend((x, clean))
        return clean

    return denoise


@pytest.mark.parametrize("case", [
    "p.10.clip=True",
    "p.10.learn_sigma=False.clip=False",
    "p.20.noise_schedule=squaredcos_cap_v2.clip=True",
    "ddim.10.clip=True.eta=0.0",
    "ddim.10-10-20.clip=False.eta=0.0",
])  # fmt: skip
def test_chains_of_dit(case: str) -> None:
    one = DIT_CASES[case]
    made = one["create_diffusion"]
    schedule = Schedule("cosine") if "noise_schedule" in made else Schedule("linear", 0.0001, 0.02)
    grid = levels_of(schedule, made["timestep_respacing"])
    learned: list[Tensor] = []
    denoise = dit_network(learned, clip=one["clip_denoised"])
    sampler: Any = sampler_by_name("ddim", eta=one["eta"]) if case.startswith("ddim") else sampler_by_name("ddpm")
    if case.startswith("p."):  # the large fixed variance is the upper end of the learned range
        sampler = sampler.with_variance(learned if made.get("learn_sigma", True) else [torch.ones(())])
    x = DIT["x_T"]
    assert_near(sampler(denoise, x, grid, noise=by_number(x)), DIT[case])


def test_inversion_of_ddim() -> None:
    """Up the levels; the last step is to pure noise."""
    schedule = Schedule("linear", 0.0001, 0.02)
    grid = [*levels_of(schedule, "10")[-2::-1], Level(0.0, 1.0, None)]
    x = 0.3 * DIT["x_T"]
    found = sampler_by_name("ddim", eta=0.0)(dit_network([]), x, grid, noise=by_number(x))
    assert_near(found, DIT["ddim_reverse.10.clip=False"])


def test_the_bound_of_dit() -> None:
    """calc_bpd_loop: each term, their sum, and the errors of the clipped estimates."""
    schedule = Schedule("linear", 0.0001, 0.02)
    grid = levels_of(schedule, "10")
    clean, learned, seen = DIT["bpd.x_start"], list[Tensor](), list[Tensor]()
    noise = by_number(clean)
    terms = variational_bound(dit_network(learned, clip=True, at=seen), grid, clean, noise, learned)
    assert_near(terms[:, 0], DIT["bpd.prior_bpd"])
    assert_near(terms[:, 1:], DIT["bpd.vb"])
    assert_near(terms.sum(1), DIT["bpd.total_bpd"])
    estimates = torch.stack(seen[1::2], dim=1)
    assert_near((estimates - clean[:, None]).square().mean(dim=(2, 3, 4)).float(), DIT["bpd.xstart_mse"])
    eps = [noise_of(x, found, level) for x, found, level in zip(seen[::2], seen[1::2], grid[:-1], strict=True)]
    errors = [(found - noise(i)).square().mean(dim=(1, 2, 3)) for i, found in enumerate(eps)]
    assert_near(torch.stack(errors, dim=1), DIT["bpd.mse"])


def test_the_bound_of_a_known_density() -> None:
    """With the exact means and variances of a Gaussian's reverse steps it is -log2 of the bin's probability."""
    sd, value, learned = 0.5, 0.2, list[Tensor]()
    grid = Schedule("linear", 0.0001, 0.02).grid(40, "linspace")
    clean = torch.full((20_000, 1, 1, 1), value)
    lower = 0.0

    def denoise(x: Tensor, level: Level) -> Tensor:
        nonlocal lower
        there = grid[grid.index(level) + 1]
        total = level.alpha**2 * sd**2 + level.sigma**2
        beta = level.sigma**2 - (level.alpha / there.alpha) ** 2 * there.sigma**2
        lower = math.log(beta * there.sigma**2 / level.sigma**2) if there.sigma else lower
        spread = (there.alpha * beta / level.sigma**2) ** 2 * sd**2 * level.sigma**2 / total
        exact = math.log(beta * there.sigma**2 / level.sigma**2 + spread)
        learned[:] = [torch.tensor(2 * (exact - lower) / (math.log(beta) - lower) - 1)]
        return level.alpha * sd**2 / total * x

    terms = variational_bound(denoise, grid, clean, by_number(clean), learned)
    probability = 2 / 255 * math.exp(-0.5 * (value / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    assert float(terms.sum(1).mean()) == pytest.approx(-math.log2(probability), abs=0.02)  # 20,000 draws


PATHS: dict[str, ContinuousPath] = {
    "Linear": LinearPath(1.0, 0.0),
    "GVP": CosinePath(1.0, 0.0),
    "VP": VariancePreservingPath(1.0, 0.0, margins=(0.0, 0.0)),
}
ODES, ODE_CASES = recorded("sit/odes")


def flow(kind: str, c: Tensor | None = None) -> Callable[[Tensor, Level], Tensor]:
    """The clean estimate of the stand-in, a velocity."""
    form = Parameterization(VelocityPrediction("data"), PATHS[kind])

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return form.clean(x, field(x, torch.tensor([level.time], dtype=torch.float64).to(x.dtype), c), level)

    return denoise


@pytest.mark.parametrize("case", [case for case in ODE_CASES if "reverse" in case])
def test_flows_of_sit_from_data_to_noise(case: str) -> None:
    one = ODE_CASES[case]
    path, tight = PATHS[one["path_type"]], one["dtype"] == "float64"
    times = torch.linspace(1, 0, one["num_steps"], dtype=torch.float64).tolist()
    options = {"rtol": 1e-9, "atol": 1e-9} if tight else {}
    sampler: Any = sampler_by_name("ode", method=one["sampling_method"], **options)
    x = ODES["x_T"].double() if tight else ODES["x_T"]
    found = sampler.along(path)(flow(one["path_type"]), x, [path.level(t) for t in times], noise=by_number(x))
    assert_near(found, ODES[case], 1e-7 if tight else 5e-5)


def test_a_guided_flow_of_sit() -> None:
    one, path = ODE_CASES["guided.11"], PATHS["Linear"]
    given, none = flow("Linear", torch.tensor(one["c"])), flow("Linear", torch.tensor([0.0]))

    def denoise(x: Tensor, level: Level) -> Tensor:
        return torch.lerp(none(x, level), given(x, level), one["guidance"])

    sampler: Any = sampler_by_name("ode", method="euler")
    x = ODES["x_T"]
    assert_near(sampler.along(path)(denoise, x, path.grid(10), noise=by_number(x)), ODES["guided.11"])


SDES, SDE_CASES = recorded("sit/sdes")


@pytest.mark.parametrize("case", [c for c in SDE_CASES if c in SDES and SDE_CASES[c]["last_step"] is None])
def test_sdes_of_sit_without_a_last_step(case: str) -> None:
    """Its noise on the way to the data is left out here."""
    one = SDE_CASES[case]
    kind = one["path_type"]
    path, end = PATHS[kind], 0.999 if kind == "VP" else 1.0
    times = torch.linspace(0, end, one["num_steps"], dtype=torch.float64).tolist()
    grid = [path.level(t) for t in times]
    sampler: Any = sampler_by_name("sde", form=one["diffusion_form"]).along(path)  # type: ignore[attr-defined]
    x = SDES["x_T"]
    found = sampler(flow(kind), x, grid, noise=by_number(x))
    if grid[-1].sigma == 0:
        length = times[1] - times[0]
        found = found + math.sqrt(2 * sampler.diffusion(grid[-2]) * length) * by_number(x)(len(grid) - 2)
    assert_near(found, SDES[case])
