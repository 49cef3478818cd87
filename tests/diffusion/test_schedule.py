"""The schedules against the values of the paper's code."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ldmlab.diffusion.schedule import NAMES, Schedule, ddim_grid
from ldmlab.errors import InputError

REFERENCE = Path(__file__).parents[1] / "assets" / "reference"


@pytest.mark.parametrize(
    ("start", "end", "first", "middle", "last"),
    [
        (0.0015, 0.0195, 0.998500, 0.115844, 1.42304e-4),
        (0.0015, 0.0205, 0.998500, 0.108576, 9.69109e-5),
        (0.0015, 0.0155, 0.998500, 0.151077, 6.68665e-4),
        (0.00085, 0.0120, 0.999150, 0.277670, 4.66010e-3),
    ],
)
def test_alpha_bar_of_the_papers_schedules(start: float, end: float, first: float, middle: float, last: float) -> None:
    table = Schedule("scaled_linear", start, end).alpha_bar
    assert table.dtype == torch.float64
    assert [float(table[i]) for i in (0, 499, 999)] == pytest.approx([first, middle, last], rel=6e-6)  # as printed


@pytest.mark.parametrize(("start", "end"), [("0.0015", "0.0195"), ("0.00085", "0.012")])
def test_alpha_bar_of_the_official_program(start: str, end: str) -> None:
    official = load_file(REFERENCE / "samplers.safetensors")[f"{start}-{end}.alphas_cumprod"]
    torch.testing.assert_close(
        Schedule("scaled_linear", float(start), float(end)).alpha_bar.float(), official, rtol=2e-7, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_falls_from_near_one(name: str) -> None:
    schedule = Schedule(name, 0.0001, 0.02)
    assert schedule.alpha_bar.shape == (1000,)
    assert 0.98 < schedule.alpha_bar[0] < 1
    assert (schedule.alpha_bar.diff() < 0).all()
    assert schedule.alpha_bar[-1] < 0.01


def test_what_the_other_names_mean() -> None:
    assert float(Schedule("linear", 0.0001, 0.02).betas[500]) == pytest.approx(0.0001 + 0.0199 * 500 / 999)
    assert float(Schedule("sqrt", 0.0004, 0.04).betas[0]) == pytest.approx(0.02)
    cosine = Schedule("cosine")
    expected = math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert float(cosine.alpha_bar[499]) == pytest.approx(expected)
    assert float(cosine.betas.max()) == 0.999


def test_levels_are_float32_and_keep_their_precision() -> None:
    schedule = Schedule()
    alpha, sigma = schedule.levels(torch.tensor([0, 999]))
    assert alpha.shape == (2, 1, 1, 1)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha.flatten().double() ** 2, schedule.alpha_bar[[0, 999]], rtol=2e-7, atol=0)
    torch.testing.assert_close(sigma.flatten().double() ** 2, 1 - schedule.alpha_bar[[0, 999]], rtol=2e-7, atol=0)


@pytest.mark.parametrize("options", [{"name": "linnear"}, {"steps": 0}, {"start": 0.5, "end": 0.1}, {"end": 1.5}])
def test_what_is_no_schedule_is_refused(options: dict) -> None:
    with pytest.raises(InputError, match=r"diffusion\.schedule\."):
        Schedule(**options)


@pytest.mark.parametrize(("start", "end"), [("0.0015", "0.0195"), ("0.00085", "0.012")])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_official_grid(start: str, end: str, steps: int) -> None:
    visited = json.loads((REFERENCE / "samplers.json").read_text())[f"{start}-{end}.ddim_timesteps.{steps}"]
    schedule = Schedule("scaled_linear", float(start), float(end))
    grid = ddim_grid(schedule, steps)
    assert [level.time for level in grid] == [*map(float, reversed(visited)), None]
    assert grid[-1].alpha == pytest.approx(math.sqrt(schedule.alpha_bar[0]))  # not 1
    assert all(level.alpha**2 + level.sigma**2 == pytest.approx(1) for level in grid)


def test_official_grid_refuses_what_it_cannot_take() -> None:
    schedule = Schedule()
    works = []
    for steps in range(1, 1001):
        try:
            works.append(len(ddim_grid(schedule, steps)) - 1)
        except InputError as error:
            assert "spacing=linspace" in str(error)  # noqa: PT017
    assert {1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 250, 500} <= set(works)
    assert not {3, 9, 27, 36, 37, 101, 111, 150, 251, 333, 400, 501, 1000} & set(works)
    with pytest.raises(InputError, match=r"steps=400: .*use steps=250 or 500"):
        ddim_grid(schedule, 400)
    assert len(ddim_grid(schedule, 400, "linspace")) == 401


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [1, 3, 37, 1000])
def test_other_grids_start_at_the_noisiest_level_and_end_clean(spacing: str, steps: int) -> None:
    grid = ddim_grid(Schedule(), steps, spacing)
    times = [level.time for level in grid[:-1]]
    assert times[0] == 999
    assert len(set(times)) == steps
    assert times == sorted(times, reverse=True)
    assert grid[-1][:3] == (1.0, 0.0, None)


@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
@pytest.mark.parametrize("name", NAMES)
def test_grids_between_the_schedules_levels(name: str, spacing: str) -> None:
    """Both ends are the schedule's, and a time with a fraction tells the noise between its two neighbours."""
    schedule = Schedule(name, 0.0001, 0.02)
    known = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log() / 2
    grid = ddim_grid(schedule, 25, spacing)
    assert len(grid) == 26
    assert grid[-1][:3] == (1.0, 0.0, None)
    assert [grid[0].time, grid[24].time] == pytest.approx([999, 0], abs=1e-6)
    for level in grid[:-1]:
        assert level.alpha**2 + level.sigma**2 == pytest.approx(1)
        below = min(int(level.time), 998)  # type: ignore[arg-type]
        expected = torch.lerp(known[below], known[below + 1], level.time - below)  # type: ignore[operator]
        assert math.log(level.alpha / level.sigma) == pytest.approx(float(expected), abs=1e-6)


def test_what_karras_and_log_snr_space_evenly() -> None:
    karras, even = (ddim_grid(Schedule(), 25, spacing)[:-1] for spacing in ("karras", "log_snr"))
    for steps in (
        torch.tensor([(level.sigma / level.alpha) ** (1 / 7) for level in karras]).diff(),
        torch.tensor([math.log(level.alpha / level.sigma) for level in even]).diff(),
    ):
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=1e-4, atol=0)
    assert [level.time for level in ddim_grid(Schedule(), 1, "karras")] == [pytest.approx(999), None]
    assert ddim_grid(Schedule(steps=1), 1, "log_snr")[0].time == 0


def test_official_grid_is_rounded_as_the_official_table() -> None:
    """float32: the smallest alpha_bar and what is left of 1."""
    grid = ddim_grid(Schedule(), 50)
    table = load_file(REFERENCE / "samplers.safetensors")["0.0015-0.0195.alphas_cumprod"]
    times = [*(int(level.time) for level in grid[:-1]), 0]  # type: ignore[arg-type]
    torch.testing.assert_close(torch.tensor([level.alpha for level in grid]), table[times].sqrt(), rtol=1.2e-7, atol=0)
    assert [level.sigma**2 for level in grid] == pytest.approx((1 - table[times]).tolist(), rel=1e-15)


def test_ddpm_grid_visits_every_level() -> None:
    assert [level.time for level in ddim_grid(Schedule(steps=10), 10, "linspace")] == [
        *map(float, range(9, -1, -1)),
        None,
    ]
    assert len(ddim_grid(Schedule(), 25, "linspace")) == 26


@pytest.mark.parametrize(("steps", "spacing"), [(0, "official"), (1001, "linspace"), (10, "evenly")])
def test_what_is_no_grid_is_refused(steps: int, spacing: str) -> None:
    with pytest.raises(InputError, match=r"steps=|spacing="):
        ddim_grid(Schedule(), steps, spacing)
