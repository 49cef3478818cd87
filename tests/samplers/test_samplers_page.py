"""docs/samplers.md names every sampler and spacing, and its errors are those that are measured here."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_mixture import denoise, exact_end

from ldmlab.contracts import Sampler
from ldmlab.diffusion.respacing import SPACINGS
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import SAMPLERS, sampler_by_name

PAGE = (Path(__file__).parents[2] / "docs" / "samplers.md").read_text()
BUDGETS = (10, 20, 50)


def error(sampler: Sampler, spacing: str, steps: int) -> float:
    """Root mean square distance to where the exact flow ends, over 400 quantiles of the noise."""
    try:
        grid = ddim_grid(Schedule(), steps, spacing)
    except InputError:
        return math.nan  # steps that the official rule cannot take
    x = torch.special.ndtri((torch.arange(400, dtype=torch.float64) + 0.5) / 400) * grid[0].sigma
    distance = sampler(denoise, x, grid, noise=torch.zeros_like) - exact_end(x, grid[0], grid[-1])  # type: ignore[arg-type]
    return float(distance.square().mean().sqrt())


def rows(heading: str) -> dict[str, list[str]]:
    """First cell => the cells after it, of the table below a heading."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", section, re.M)
    ]
    return {cells[0]: cells[1:] for cells in lines[2:]}


def test_every_sampler_and_spacing_is_named() -> None:
    assert sorted(rows("Which sampler")) == SAMPLERS
    assert sorted(rows("Which steps")) == sorted(SPACINGS)
    assert sorted(rows("Measured")) == [
        name
        for name in SAMPLERS
        if sampler_by_name(name).order is not None and name not in ("ode", "dpm_adaptive")  # type: ignore[attr-defined]
    ]


@pytest.mark.parametrize("name", rows("Which sampler"))
def test_orders_evaluations_and_steps_are_the_code_s(name: str) -> None:
    sampler = sampler_by_name(name)
    order, _, steps, spacing, _ = rows("Which sampler")[name]
    assert order == str(getattr(sampler, "order", None) or "draws noise")
    assert steps == str(getattr(sampler, "steps", None) or "all")
    assert spacing == sampler.spacing  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", rows("Measured"))
def test_errors_of_samplers(name: str) -> None:
    sampler: Any = sampler_by_name(name)
    sampler = sampler.along(Schedule())
    steps = [budget // 2 if name in ("heun", "dpm_2") else budget for budget in BUDGETS]
    measured = [error(sampler, sampler.spacing, s) for s in steps]
    assert [float(cell) for cell in rows("Measured")[name]] == pytest.approx(measured, rel=0.01, abs=6e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_errors_of_spacings(spacing: str) -> None:
    measured = [error(sampler_by_name("dpmpp_2m"), spacing, budget) for budget in BUDGETS]
    cells = [float(cell) for cell in rows("Which steps")[spacing][1:]]
    assert cells == pytest.approx(measured, rel=0.01, abs=6e-5)
