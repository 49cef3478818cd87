"""What every sampler must hold, on distributions whose exact denoiser is known; samplers are found by their files."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from exact_mixture import MEAN, STD, denoise, exact_end
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.paths import ContinuousPath, CosinePath, EdmPath, LinearPath
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import SAMPLERS as ALL
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.randomness import normal
from ldmlab.samplers._stepwise import log_snr
from ldmlab.samplers.unipc import moment

FLOWS = ["ode", "sde"]  # of continuous paths alone
SAMPLERS = [name for name in ALL if name not in [*FLOWS, "consistency"]]  # which needs the end of the flow at once
STEPWISE = [name for name in SAMPLERS if getattr(sampler_by_name(name), "shows_steps", True)]
DETERMINISTIC = [name for name in STEPWISE if sampler_by_name(name).order is not None]  # type: ignore[attr-defined]
STOCHASTIC = [name for name in SAMPLERS if sampler_by_name(name).order is None]  # type: ignore[attr-defined]


def draw(step: int) -> Tensor:
    return normal(1, "sample", torch.arange(4000), (), step=step + 1).double()


def start(grid: list[Level]) -> Tensor:
    """4,000 draws at the first level, which is all but noise."""
    return grid[0].sigma * normal(0, "start", torch.arange(4000), ()).double()


def made(name: str, path: Any, **options: Any) -> Any:
    """A sampler on a path."""
    sampler: Any = sampler_by_name(name, **options)
    return sampler.along(path)


def run(name: str, x: Tensor, grid: list[Level], after_step: Any = None, path: Any = None, **options: Any) -> Tensor:
    return made(name, path or Schedule(), **options)(denoise, x, grid, noise=draw, after_step=after_step)  # type: ignore


class Exploding(ContinuousPath):
    """alpha = 1, sigma = s."""

    def curve(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(s), s

    def slopes(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(s), torch.ones_like(s)

    def position_of(self, ratio: Tensor) -> Tensor:
        return ratio


class Log(Exploding):
    """alpha = 1, sigma = e^s."""

    def curve(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(s), s.exp()

    def position_of(self, ratio: Tensor) -> Tensor:
        return ratio.log()


def path(steps: int, first: float, last: float, curve: ContinuousPath) -> list[Level]:
    """Even steps along a smooth path: no kink of a discrete schedule hides the order."""
    places = [first + k * (last - first) / steps for k in range(steps + 1)]
    return [*(curve.level(place) for place in places[:-1]), curve.level(places[-1])._replace(time=None)]


ANGLE, FLOW, EXPLODING = CosinePath(0.0, math.pi / 2), LinearPath(0.0, 1.0), Exploding(0.0, 1.0)
PATHS: dict[str, tuple[ContinuousPath, float, float]] = {
    "variance preserving": (ANGLE, 1.5, 0.15),
    "rectified flow": (FLOW, 0.9, 0.05),
    "variance exploding": (EXPLODING, 2.0, 0.1),
}


def orders(name: str, kind: str, counts: Sequence[int] = (80, 160, 320), **options: Any) -> list[float]:
    """By how many halvings the error falls when the steps are halved, twice."""
    errors = []
    curve, first, last = PATHS[kind]
    for steps in counts:
        grid = path(steps, first, last, curve)
        x = torch.linspace(-1.8, 1.8, 41, dtype=torch.float64) * math.hypot(grid[0].alpha, grid[0].sigma)
        if name == "ode":
            grid[-1] = curve.level(last)
        found = run(name, x, grid, path=curve, **options)
        errors.append(float((found - exact_end(x, grid[0], grid[-1])).abs().max()))
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order(name: str, kind: str) -> None:
    order = sampler_by_name(name).order  # type: ignore[attr-defined]
    found = orders(name, kind)
    if name == "plms" and kind == "variance exploding":  # even steps in sigma / alpha, for which its weights are made
        assert min(found) > 3.5
    elif name == "lms":  # of order 4 but for its first steps, whose error is what remains
        assert min(found) > 1.9
    else:
        assert found == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize(("counts", "order"), [((81, 162, 324), 2), ((79, 160, 322), 2), ((80, 161, 323), 3)])
def test_order_of_dpm_fast(counts: tuple[int, ...], order: int, kind: str) -> None:
    """Of order 3 unless the last step, by what is left of the evaluations, is one of order 1."""
    assert orders("dpm_fast", kind, counts) == pytest.approx([order] * 2, abs=0.2)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("order", [2, 3])
def test_dpm_adaptive_meets_its_tolerance(order: int, kind: str) -> None:
    curve, first, last = PATHS[kind]
    grid = path(10, first, last, curve)
    x = torch.linspace(-1.8, 1.8, 41, dtype=torch.float64) * math.hypot(grid[0].alpha, grid[0].sigma)
    for tolerance in (1e-2, 1e-4):
        found = run("dpm_adaptive", x, grid, path=curve, rtol=tolerance, atol=tolerance, order=order)
        assert float((found - exact_end(x, grid[0], grid[-1])).abs().max()) < 5 * tolerance


def test_samplers_that_choose_their_steps_have_none_to_show() -> None:
    for name in ("dpm_fast", "dpm_adaptive"):
        with pytest.raises(InputError, match="has no steps to show or to change"):
            run(name, torch.zeros(3), ddim_grid(Schedule(), 5), after_step=lambda step, x, clean: x)
        with pytest.raises(InputError, match="give it a path by along"):
            sampler_by_name(name)(denoise, torch.zeros(3), ddim_grid(Schedule(), 5), noise=draw)


@pytest.mark.parametrize(("predictor_order", "corrector", "order"), [(1, False, 1), (1, True, 2), (2, False, 2)])
def test_order_of_unipc_by_its_settings(predictor_order: int, corrector: bool, order: int) -> None:
    found = orders("unipc", "rectified flow", predictor_order=predictor_order, corrector=corrector)
    assert found == pytest.approx([order] * 2, abs=0.1)


def test_unipc_of_order_3_errs_less_than_of_order_2() -> None:
    grid = path(40, 1.5, 0.15, ANGLE)
    x = torch.linspace(-1.8, 1.8, 41, dtype=torch.float64)
    exact = exact_end(x, grid[0], grid[-1])
    errors = [float((run("unipc", x, grid, predictor_order=order) - exact).abs().max()) for order in (1, 2, 3)]
    assert errors[0] > 4 * errors[1] > 4 * 1.5 * errors[2]


@pytest.mark.parametrize("power", [0, 1, 2, 3])
@pytest.mark.parametrize("length", [1e-3, 0.1, 0.999, 1.001, 6.0])
def test_moments_of_unipc(power: int, length: float) -> None:
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000  # midpoint rule
    expected = float((length * torch.exp(-length * (1 - u)) * u**power).mean())
    assert moment(length, power) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("curve", "first", "last"),
    [(ANGLE, math.pi / 2, 0.0), (FLOW, 1.0, 0.0), (Log(0.0, 1.0), math.log(80), math.log(0.01))],
    ids=["zero terminal signal", "rectified flow", "alpha 1"],
)
@pytest.mark.parametrize("name", SAMPLERS)
def test_paths_to_and_from_infinite_log_snr(name: str, curve: ContinuousPath, first: float, last: float) -> None:
    """The quantiles of the exact end, within what 4,000 draws and 60 steps allow."""
    levels = [*path(60, first, last, curve)[:-1], Level(1.0, 0.0, None)]
    assert levels[0].alpha in (0.0, 1.0)
    assert log_snr(levels[-1]) == math.inf
    x = run(name, start(levels), levels, path=curve)
    shares = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    uniform = torch.special.ndtri(shares) * levels[0].sigma
    exact = exact_end(uniform, levels[0], levels[-1])
    assert (
        float((torch.quantile(x, shares) - exact).abs().max()) < 0.15
    )  # at 0.3, between the parts, two standard errors


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_have_the_right_distribution(name: str) -> None:
    grid = ddim_grid(Schedule(), 250, "linspace")
    x = run(name, start(grid), grid)
    # standard errors of 4,000 draws: 0.015 of the mean, less of the deviation; the steps themselves cost less
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.045)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_matters(name: str) -> None:
    """Where noise is drawn, other noise gives another image, and the same noise the same one."""
    grid = ddim_grid(Schedule(), 20)
    x, sampler = start(grid), made(name, Schedule())
    ends = [sampler(denoise, x, grid, noise=lambda step, sign=sign: sign * draw(step)) for sign in (1, 1, -1)]
    assert torch.equal(ends[0], ends[1])
    assert float((ends[0] - ends[2]).abs().mean()) > 0.1


@pytest.mark.parametrize("name", [n for n in SAMPLERS if not getattr(sampler_by_name(n), "one_image", False)])
def test_a_image_is_the_same_in_any_batch(name: str) -> None:
    grid = ddim_grid(Schedule(), 10)
    x = start(grid)
    alone = made(name, Schedule())(denoise, x[7:8], grid, noise=lambda step: draw(step)[7:8])
    torch.testing.assert_close(alone, run(name, x, grid)[7:8], rtol=1e-12, atol=1e-12)


def test_ancestral_steps_without_noise_are_eulers() -> None:
    grid = ddim_grid(Schedule(), 10, "karras")
    x = start(grid)
    assert torch.equal(run("euler_ancestral", x, grid, eta=0.0), run("euler", x, grid))
    torch.testing.assert_close(run("ddim", x, grid), run("euler", x, grid), rtol=1e-12, atol=1e-12)


def test_ancestral_steps_draw_as_ddim_with_eta() -> None:
    grid = ddim_grid(Schedule(), 10, "karras")
    x = start(grid)
    for eta in (0.5, 1.0):
        torch.testing.assert_close(run("euler_ancestral", x, grid, eta=eta), run("ddim", x, grid, eta=eta))


@pytest.mark.parametrize("name", STEPWISE)
def test_after_step_sees_every_step_and_may_change_x(name: str) -> None:
    seen = []

    def after_step(step: int, x: Tensor, clean: Tensor) -> Tensor:
        seen.append(step)
        assert clean.shape == x.shape
        return torch.zeros_like(x)

    x = run(name, torch.ones(4000, dtype=torch.float64), ddim_grid(Schedule(), 5), after_step=after_step)
    assert seen == [0, 1, 2, 3, 4]
    assert not x.any()


@pytest.mark.parametrize("name", SAMPLERS)
def test_float32_stays_float32(name: str) -> None:
    x = made(name, Schedule())(denoise, torch.zeros(3), ddim_grid(Schedule(), 5), noise=lambda step: torch.zeros(3))
    assert x.dtype == torch.float32


def test_names_and_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(InputError, match="sampler=dimm is unknown; choose one of consistency"):
        sampler_by_name("dimm")
    with pytest.raises(InputError, match=r"eta=0.5: the sampler ddpm has no such setting"):
        sampler_by_name("ddpm", eta=0.5)
    with pytest.raises(InputError, match=r"eta=1.5 is not within 0 .. 1;"):
        sampler_by_name("ddim", eta=1.5)
    for name in ("euler_ancestral", "dpm_2", "dpmpp_sde", "dpmpp_3m_sde", "dpm_fast"):
        with pytest.raises(InputError, match="eta=-1 is not a finite number of 0 or more"):
            sampler_by_name(name, eta=-1)
    with pytest.raises(InputError, match=r"sampler\.variable=time is unknown; choose"):
        sampler_by_name("euler:variable=time")
    with pytest.raises(InputError, match=r"sampler\.alpha=1\.5 is not above 0 and up to 1"):
        sampler_by_name("heun", alpha=1.5)
    with pytest.raises(InputError, match="undefined on a discrete schedule"):
        run("heun", torch.zeros(4000, dtype=torch.float64), ddim_grid(Schedule(), 5), variable="position")
    with pytest.raises(InputError, match="r=1 is no place within a step"):
        sampler_by_name("dpmpp_sde", r=1)
    with pytest.raises(InputError, match="rtol=0"):
        sampler_by_name("dpm_adaptive", rtol=0)
    with pytest.raises(InputError, match="predictor_order=4 is not 1, 2 or 3"):
        sampler_by_name("unipc", predictor_order=4)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("heun2", 2), ("heun3", 3), ("rk4", 4)])
@pytest.mark.parametrize("kind", ["variance preserving", "rectified flow"])
def test_order_of_the_solvers_of_a_flow(method: str, order: int, kind: str) -> None:
    assert orders("ode", kind, (20, 40, 80), method=method) == pytest.approx([order] * 2, abs=0.4)


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("variable", ["sigma", "variance", "position"])
def test_order_of_steps_in_any_variable(variable: str, kind: str) -> None:
    assert orders("euler", kind, variable=variable) == pytest.approx([1] * 2, abs=0.2)
    for alpha in (0.5, 1.0):
        # the variance falls so fast at the noise end that these steps come from above: 2.7, 2.5, 2.4
        assert 1.8 < min(orders("heun", kind, variable=variable, alpha=alpha)) < 2.6


def test_an_adaptive_solver_meets_its_tolerance_from_pure_noise_to_the_clean_end() -> None:
    grid = FLOW.grid(1)
    x = torch.linspace(-2, 2, 41, dtype=torch.float64)
    for tolerance in (1e-4, 1e-7):
        found = run("ode", x, grid, path=FLOW, rtol=tolerance, atol=tolerance)
        assert float((found - exact_end(x, grid[0], grid[-1])).abs().max()) < 50 * tolerance


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", ["constant", "sigma", "linear", "decreasing", "increasing_decreasing", "sbdm"])
def test_any_amount_of_noise_gives_the_same_distribution(form: str, method: str) -> None:
    grid = [level for level in FLOW.grid(200) if level.alpha > 0] if form == "sbdm" else FLOW.grid(200)
    x = run("sde", start(grid) + 0 * grid[0].alpha, grid, path=FLOW, form=form, method=method)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.045)
    assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("name", FLOWS)
def test_flows_are_no_discrete_schedules(name: str) -> None:
    with pytest.raises(InputError, match="undefined on a discrete schedule"):
        run(name, torch.zeros(4000, dtype=torch.float64), ddim_grid(Schedule(), 5))


@pytest.mark.slow
def test_a_step_from_a_level_that_churn_raised() -> None:
    """As much noise as the level says: the distribution is that of the data whatever the churn."""
    for name in ("euler", "heun", "dpm_2"):
        grid = ddim_grid(Schedule(), 250, "karras")
        x = run(name, start(grid), grid, churn=40.0, churn_noise=1.0)
        assert float(x.std()) == pytest.approx(STD, abs=0.03)


@pytest.mark.parametrize("rho", [3, 5, 7])
@pytest.mark.parametrize(("low", "high"), [(0.01, 50.0), (0.0292, 14.6146), (0.002, 5.0)])
def test_churn_acts_at_its_bounds(low: float, high: float, rho: int) -> None:
    """Also where rounding puts a level of the grid beyond them."""
    path, drawn = EdmPath(low, high), list[int]()

    def noise(step: int) -> Tensor:
        drawn.append(step)
        return torch.zeros(3, dtype=torch.float64)

    sampler: Any = sampler_by_name("euler", churn=10.0, churn_min=low, churn_max=high)
    sampler.along(path)(lambda x, level: 0.5 * x, torch.ones(3).double(), path.grid(6, f"karras:{rho}"), noise=noise)
    assert drawn == [*range(6)]


def test_a_name_may_hold_options() -> None:
    sampler: Any = sampler_by_name("sde:form=linear:norm=0.5:method=heun")
    assert (sampler.form, sampler.norm, sampler.method) == ("linear", 0.5, "heun")
    with pytest.raises(InputError, match="sampler=lms:depth=2 and its options give one of them twice"):
        sampler_by_name("lms:depth=2", depth=3)
    for name, sentence in (
        ("sde:form=blue", "sampler.form=blue is unknown"),
        ("sde:norm=much", "sampler.norm=much does not fit"),
        ("sde:norm=1:norm=2", "give one of them twice"),
        ("euler:", "sampler=NAME: has no option"),
        ("euler:churn", "sampler=NAME:churn has no option"),
        ("heun:depth=2", "depth=2: the sampler heun has no such setting"),
    ):
        with pytest.raises(InputError, match=sentence):
            sampler_by_name(name)
