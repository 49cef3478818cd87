"""Discrete schedulers, weights and targets of diffusers that other tests do not hold, as recorded."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.averaging import AveragedWeights
from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import EpsPrediction, VPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.diffusion.weighting import MinSnr
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers.diffusers_schedulers import sampler_node
from modern_cases import assert_near, drawn_noise, field, recorded

DDPM, CASES = recorded("diffusers/ddpm_family")
X = DDPM["x_T"]
END = Level(1.0, 0.0, None)
SCHEDULE = Schedule("scaled_linear", 0.00085, 0.012)


def noise(step: int) -> Tensor:
    return drawn_noise(f"noise.{step + 1}", *X.shape)


def denoiser(case: str, limit: float = math.inf) -> Any:
    """The clean estimate of the stand-in, taken as the case's prediction; `limit`: where it is clipped."""
    prediction = VPrediction() if CASES[case].get("prediction_type") == "v_prediction" else EpsPrediction()

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return prediction.clean(x, field(x, level.time / 1000), level).clamp(-limit, limit)

    return denoise


def grid_of(case: str) -> list[Level]:
    """The recorded sigma / alpha, at the recorded times."""
    ratios, times = DDPM[f"{case}.sigmas"].double(), [float(t) for t in DDPM[f"{case}.timesteps"]]
    levels = [
        Level(1 / math.sqrt(1 + s * s), s / math.sqrt(1 + s * s), t)
        for s, t in zip(ratios.tolist(), [*times, 0.0], strict=True)
    ]
    return levels if float(ratios[-1]) else [*levels[:-1], END]


@pytest.mark.parametrize("case", ["2m.karras", "2m_sde.karras"])
def test_karras_steps(case: str) -> None:
    """Even in sigma^(1/7) between the ends of the table; diffusers rounds the times to whole ones."""
    grid = grid_of(case)
    ours = SCHEDULE.grid(10, "karras")
    ratio = torch.tensor([level.sigma / level.alpha for level in ours])
    assert_near(ratio, DDPM[f"{case}.sigmas"])
    assert all(abs((a.time or 0) - (b.time or 0)) <= 1 for a, b in zip(ours, grid, strict=True))
    sampler = sampler_by_name("dpmpp_2m_sde" if "sde" in case else "dpmpp_2m")
    assert_near(sampler(denoiser(case), X, grid, noise=noise), DDPM[case])


@pytest.mark.parametrize("case", ["3m", "3m.long"])
def test_third_order(case: str) -> None:
    sampler = sampler_by_name("dpmpp_3m_sde", eta=0.0, midpoint=True, lower_order_final=True)
    assert_near(sampler(denoiser(case), X, grid_of(case), noise=noise), DDPM[case])


MULTISTEP = "DPMSolverMultistepScheduler"


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("scheduler") == MULTISTEP])
def test_the_solver_of_a_folder_s_scheduler(case: str) -> None:
    """Its settings become a sampler that visits the same times."""
    one = CASES[case]
    node = sampler_node({"_class_name": MULTISTEP, **one})
    sampler: Any = instantiate(node, where="sampler")
    ends = {"noisy_end": one.get("final_sigmas_type") == "sigma_min"}
    grid = Schedule("scaled_linear", 0.00085, 0.012, **ends).grid(one["num_inference_steps"], sampler.spacing)
    if one.get("use_karras_sigmas"):
        grid = grid_of(case)  # at rounded times
    assert [level.time for level in grid[:-1]] == DDPM[f"{case}.timesteps"].tolist()
    assert_near(sampler(denoiser(case), X, grid, noise=noise), DDPM[case])


@pytest.mark.parametrize("case", ["ddim.eps.eta", "ddim.v"])
def test_ddim(case: str) -> None:
    last = END if CASES[case].get("set_alpha_to_one", True) else SCHEDULE.level(0.0)
    grid = [*(SCHEDULE.level(float(t)) for t in DDPM[f"{case}.timesteps"]), last]
    if not CASES[case].get("set_alpha_to_one", True):
        assert [level.time for level in SCHEDULE.grid(10, "official")[:-1]] == [level.time for level in grid[:-1]]
    sampler = sampler_by_name("ddim", eta=CASES[case]["step"].get("eta", 0.0))
    assert_near(sampler(denoiser(case), X, grid, noise=noise), DDPM[case])


def test_ddpm_with_the_larger_variance_and_clipped_estimates() -> None:
    """The variance of a step, which is that of a network whose v is 1."""
    case = "ddpm.fixed_large.clip"
    grid = [*(SCHEDULE.level(float(t)) for t in DDPM[f"{case}.timesteps"]), END]
    sampler: Any = sampler_by_name("ddpm")
    sampler = sampler.with_variance([torch.ones_like(X)])
    assert_near(sampler(denoiser(case, 1.0), X, grid, noise=noise), DDPM[case])


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
def test_betas_without_a_terminal_signal(name: str) -> None:
    ends = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02), "cosine": ()}[name]
    plain, rescaled = (Schedule(name, *ends, zero_terminal_snr=zero) for zero in (False, True))
    assert_near(plain.betas.float(), DDPM[f"zero_snr.{name}.betas"], 1e-6)
    assert_near(rescaled.betas.float(), DDPM[f"zero_snr.{name}.rescaled"], 2e-5)  # which it computes in float32
    assert float(rescaled.betas[-1]) == 1.0


def test_weights_by_the_ratio_of_signal_and_noise() -> None:
    alpha, sigma = SCHEDULE.levels(DDPM["snr.t"])
    snr = (alpha / sigma).square().flatten()
    torch.testing.assert_close(snr, DDPM["snr"], rtol=1e-4, atol=0)
    for gamma in CASES["min_snr"]["gamma"]:
        for name, prediction in (("epsilon", EpsPrediction()), ("v_prediction", VPrediction())):
            factor = MinSnr(gamma)(alpha, sigma, lambda: (alpha, sigma))
            slope = prediction.clean_slope(alpha, sigma)
            assert_near((factor * slope**2).flatten(), DDPM[f"min_snr.{gamma}.{name}"])


@pytest.mark.parametrize("case", ["plain", "warmup", "late"])
def test_the_warm_up_of_averaged_weights(case: str) -> None:
    """diffusers' first update copies the weights; its update n + 1 has the decay of ours n."""
    one = CASES[f"ema_decay.{case}"]
    options = one["EMAModel"]
    warmup = (options["inv_gamma"], options["power"]) if "power" in options else None
    average = AveragedWeights(torch.nn.Linear(1, 1), options["decay"], warmup, options.get("update_after_step", 0))
    for step, decay in zip(one["optimization_step"], DDPM[f"ema_decay.{case}"].tolist(), strict=True):
        average.updates = step - 1
        assert step < 2 or average._kept() == pytest.approx(decay, rel=1e-12)
    if case == "late":
        late = AveragedWeights(layer := torch.nn.Linear(1, 1), 0.999, start=1)
        for value in (2.0, 5.0):
            torch.nn.init.constant_(layer.weight, value)
            late.update()
        assert float(late.weights()["weight"]) == pytest.approx(2 + 3 * 9 / 11)  # a copy, then the first average


def test_the_velocity_of_a_schedule() -> None:
    alpha, sigma = SCHEDULE.levels(DDPM["snr.t"])
    clean, drawn = DDPM["velocity.x0"], DDPM["velocity.noise"]
    assert_near(alpha * clean + sigma * drawn, DDPM["noised"])
    assert_near(VPrediction().target(clean, drawn, alpha, sigma), DDPM["velocity"])
