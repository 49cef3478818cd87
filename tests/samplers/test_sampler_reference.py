"""DDIM and PLMS against the end points of the official program."""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.samplers.ddim import Ddim
from ldmlab.samplers.ddpm import Ddpm
from ldmlab.samplers.plms import Plms

CASES = load_file(Path(__file__).parents[1] / "assets" / "reference" / "samplers.safetensors")
SHAPE = (2, 4, 8, 8)


def drawn(name: str) -> Tensor:
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(int(np.prod(SHAPE)))
    return torch.from_numpy(draw.reshape(SHAPE)).float()


def analytic_noise(x: Tensor, time: float, told: Tensor | None) -> Tensor:
    """The predictor of the recorded runs."""
    share = torch.tensor(time / 1000)
    noise = 0.8 * torch.tanh(x * (0.5 + share)) + 0.1 * torch.sin(10 * share)
    return noise if told is None else noise + 0.2 * told * torch.cos(x)


def denoiser(guided: bool) -> Callable[[Tensor, Level], Tensor]:
    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        noise = analytic_noise(x, level.time, None)
        if guided:
            given = analytic_noise(x, level.time, torch.tensor([0.3, -1.0]).view(2, 1, 1, 1))
            noise = noise + 3 * (given - noise)
        return EpsPrediction().clean(x, noise, level)

    return denoise


@pytest.mark.parametrize("name", [name for name in CASES if ".ddim." in name])
def test_ddim_ends_where_the_official_one_does(name: str) -> None:
    """The recorded runs are float32 with values up to 179, where 1e-4 is seven roundings: the order of them counts."""
    betas, rest = name.split(".ddim.")
    steps, eta = int(rest.split(".")[0]), float(rest.split("eta")[1][:3])
    start, end = map(float, betas.split("-"))
    grid = ddim_grid(Schedule("scaled_linear", start, end), steps)
    x = Ddim(eta)(denoiser("cfg3" in name), drawn("x_T"), grid, noise=lambda step: drawn(f"noise.{step + 1}"))
    cpu = Path("/proc/cpuinfo")
    amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()  # where they agree; kernels of others round tanh otherwise
    bound = 1e-4 if amd else max(1e-4, 1e-6 * float(CASES[name].abs().max()))
    assert float((x - CASES[name]).abs().max()) < bound


@pytest.mark.parametrize("name", [name for name in CASES if ".plms." in name])
def test_plms_ends_where_the_official_one_does(name: str) -> None:
    betas, steps = name.split(".plms.")
    start, end = map(float, betas.split("-"))
    grid = ddim_grid(Schedule("scaled_linear", start, end), int(steps))
    x = Plms()(denoiser(False), drawn("x_T"), grid, noise=lambda step: drawn(f"noise.{step + 1}"))
    assert float((x - CASES[name]).abs().max()) < 1e-4


def test_a_single_step_of_plms_is_ddims() -> None:
    grid = ddim_grid(Schedule(), 1, "linspace")
    ends = [sampler(denoiser(False), drawn("x_T"), grid, noise=drawn) for sampler in (Plms(), Ddim())]  # type: ignore[arg-type]
    torch.testing.assert_close(ends[0], ends[1])


@pytest.mark.parametrize("steps", [7, 50])
def test_ddpm_is_ddim_with_eta_1_on_its_grid(steps: int) -> None:
    """Song et al. 2021, section 4.1: two derivations of one step."""
    grid = ddim_grid(Schedule(), steps, "linspace")
    ends = [
        sampler(denoiser(False), drawn("x_T").double(), grid, noise=lambda step: drawn(f"noise.{step + 1}").double())
        for sampler in (Ddpm(), Ddim(1.0))
    ]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)
