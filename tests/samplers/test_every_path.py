"""Every sampler of conf/sampler on every path, by the spacing that it has there: the exact end, or one sentence."""

from typing import Any

import pytest
import torch
from exact_mixture import MEAN, STD, denoise, exact_end
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.paths import CosinePath, EdmPath, LinearPath, VariancePreservingPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import SAMPLERS, SampleSettings, sampler_by_name
from ldmlab.randomness import normal

COUNT = 1000
PATHS: dict[str, Any] = {
    "paper": Schedule(),
    "no terminal signal": Schedule(zero_terminal_snr=True),
    "rectified flow": LinearPath(),
    "time to the data": LinearPath(1.0, 0.0),
    "shifted": LinearPath(shift=3.0),
    "with margins": LinearPath(margins=(1e-3, 1e-3)),
    "cosine": CosinePath(1.0, 0.0),
    "VP": VariancePreservingPath(),
    "EDM": EdmPath(),
}
STEPS = {"consistency": 2, "sde": 250}  # others: 50, which the official rule can take
OF_TASKS = {"consistency"}  # for networks that map to the data, which no mixture's denoiser does


def draw(step: int) -> Tensor:
    return normal(1, "sample", torch.arange(COUNT), (), step=step + 1).double()


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", sorted({*SAMPLERS} - OF_TASKS))
def test_every_sampler_on_every_path(name: str, kind: str) -> None:
    """1,000 quantiles of the noise: 0.1 off at most by order 1, 0.03 by a higher one; moments of samples with noise."""
    path, x = PATHS[kind], torch.special.ndtri((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT)

    def made() -> tuple[SampleSettings, list[Level]]:
        settings = SampleSettings(sampler=name).filled(solver=path.solver, levels=getattr(path, "steps", None))
        return settings, path.grid(STEPS.get(name, 50), settings.spacing)

    of_log_snr = getattr(sampler_by_name(name), "spacing", "") == "log_snr"
    if (kind == "no terminal signal" and of_log_snr) or (hasattr(path, "steps") and name in ("ode", "sde")):
        with pytest.raises(InputError, match=r"without signal at its end|is for flows"):
            made()
        return
    settings, grid = made()
    sampler: Any = settings.build_sampler()
    sampler = sampler.along(path) if hasattr(sampler, "along") else sampler
    found = sampler(denoise, grid[0].sigma * x, grid, noise=draw)
    if sampler.order is None:  # 1,000 draws: standard errors 0.03 of the mean, 0.02 of the deviation; and the steps'
        assert float(found.mean()) == pytest.approx(MEAN, abs=0.1)
        assert float(found.std()) == pytest.approx(STD, abs=0.12)
    else:
        exact = exact_end(grid[0].sigma * x, grid[0], grid[-1])
        assert float((found - exact).square().mean().sqrt()) < (0.1 if sampler.order == 1 else 0.03)


@pytest.mark.parametrize("kind", ["with margins", "VP", "EDM", "rectified flow"])
def test_fixed_steps_of_the_flow_end_where_the_path_does(kind: str) -> None:
    """Grids of a path with a noisy end hold that end already: there is no step of length 0 after it."""
    path, x = PATHS[kind], torch.special.ndtri((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT)
    sampler = sampler_by_name("ode", method="rk4").along(path)  # type: ignore[attr-defined]
    grid = path.grid(50)
    found = sampler(denoise, grid[0].sigma * x, grid, noise=draw)
    exact = exact_end(grid[0].sigma * x, grid[0], grid[-1])
    assert float((found - exact).square().mean().sqrt()) < 0.03
