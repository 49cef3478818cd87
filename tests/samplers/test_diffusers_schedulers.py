"""Schedulers of diffusers, read from their settings: the same levels, times and end points as recorded."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.contracts import Level
from ldmlab.diffusion.flow_match import FlowMatchPath
from ldmlab.diffusion.parameterization import Parameterization
from ldmlab.diffusion.paths import EdmPath, LinearPath
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers.diffusers_schedulers import FLOW, diffusion_node, scheduler_options
from modern_cases import assert_near, drawn_noise, field, recorded

FLOWS, FLOW_CASES = recorded("diffusers/flow_match")
RUNS = [case for case in FLOW_CASES if "set_timesteps" in FLOW_CASES[case]]


def flow_of(config: dict[str, Any]) -> tuple[FlowMatchPath, Any]:
    """Path and prediction for a scheduler's settings."""
    node = diffusion_node({"_class_name": FLOW, **config})
    return instantiate(node["schedule"], where="schedule"), instantiate(node["prediction"], where="prediction")


@pytest.mark.parametrize("case", RUNS)
def test_flows(case: str) -> None:
    one = FLOW_CASES[case]
    path, prediction = flow_of(one["scheduler"])
    steps, mu = one["set_timesteps"]["num_inference_steps"], one["set_timesteps"].get("mu")
    if mu is not None:
        few, low, many, high = path.dynamic or (0, 0, 0, 0)
        path = path.at_size(few + (mu - low) * (many - few) / (high - low))  # type: ignore[arg-type]
    grid = path.grid(steps, "linspace" if "sigmas" in one["set_timesteps"] else path.solver.spacing)
    inverted = one["scheduler"].get("invert_sigmas", False)
    sigma = torch.tensor([level.alpha if inverted else level.sigma for level in grid])
    if case != "dynamic":  # under whose name for its levels the end point of `dynamic.sigmas` lies
        assert_near(sigma, FLOWS[f"{case}.sigmas"], 1e-6)
    assert_near(torch.tensor([level.time for level in grid[:-1]]) / 1000, FLOWS[f"{case}.timesteps"] / 1000, 1e-6)
    form = Parameterization(prediction, path)

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return form.clean(x, field(x, level.time / 1000), level)

    x = FLOWS["x_T"]
    found = sampler_by_name(path.solver.sampler)(
        denoise, x, grid, noise=lambda step: drawn_noise(f"noise.{step + 1}", *x.shape)
    )
    assert_near(found, FLOWS[case])


def test_mu_of_flux_follows_from_the_size() -> None:
    path, _ = flow_of({"use_dynamic_shifting": True})
    for tokens, mu in zip(FLOW_CASES["mu"]["image_seq_len"], FLOWS["mu"].tolist(), strict=True):
        assert path.at_size(64 * tokens).shift == pytest.approx(math.exp(mu))
    linear, _ = flow_of({"use_dynamic_shifting": True, "time_shift_type": "linear", "base_shift": 1.0})
    assert linear.at_size(64 * 256).shift == pytest.approx(1.0)


def test_training_sees_the_shifted_levels_of_the_table() -> None:
    path, prediction = flow_of({"shift": 3.0})
    table = FLOWS["train.shift3.sigmas"]
    u = torch.arange(1000, 0, -1, dtype=torch.float64) / 1000
    assert_near(path.quantile(u) / 1000, FLOWS["train.shift3.timesteps"] / 1000, 1e-6)
    times = (1000 * table)[FLOWS["scale_noise.indices"]]
    alpha, sigma = path.levels(times)
    clean, noise = FLOWS["scale_noise.x0"], FLOWS["scale_noise.noise"]
    assert_near(alpha * clean + sigma * noise, FLOWS["scale_noise"])
    assert_near(prediction.target(clean, noise, alpha, sigma, path.rates(times)), noise - clean)


@pytest.mark.parametrize("case", RUNS)
def test_settings_come_back(case: str) -> None:
    """What a scheduler's settings become gives the same settings again."""
    config = FLOW_CASES[case]["scheduler"]
    name, options = scheduler_options(diffusion_node({"_class_name": FLOW, **config}))
    assert name == FLOW
    again = diffusion_node({"_class_name": name, **options})
    assert again == diffusion_node({"_class_name": FLOW, **config})


def test_other_steps_of_a_flow_match_path() -> None:
    """One step, other spacings and `with_shift` as on any flow."""
    path = FlowMatchPath(shift=3.0, terminal=0.1)
    assert [level.sigma for level in path.grid(1)] == [1.0, 0.0]
    assert FlowMatchPath(shift=3.0).grid(7, "linspace") == LinearPath(shift=3.0).grid(7)
    assert path.grid(7, "linspace")[-2].sigma == pytest.approx(0.1)
    assert path.with_shift(1.0).grid(3) == FlowMatchPath(terminal=0.1).grid(3)
    assert path.grid(4)[-2].sigma == pytest.approx(0.1)


def test_one_step_to_a_noisy_end() -> None:
    """EDMDPMSolverMultistepScheduler's levels: from sigma_max to sigma_min, where more steps have their last one."""
    path = EdmPath(0.01, 80.0, noisy_end=True)
    for steps in (1, 2, 5):
        levels = path.grid(steps, "karras")
        assert (levels[0].sigma, levels[-1].sigma) == pytest.approx((80.0, 0.01))
        assert len(levels) == steps + 1
        assert levels[-1].time is None


@pytest.mark.parametrize(("options", "why"), [
    ({"noise_time": 1.0}, "times count levels here"),
    ({"terminal": 1.0}, "terminal is within 0 .. 1"),
    ({"rule": "quad"}, "rule=quad is unknown"),
    ({"dynamic": (64, 0.5, 64, 1.15)}, "give two sizes, each with its mu"),
    ({"dynamic": (64, 0.5, 640, 1.15), "shift": 3.0}, "and no shift"),
])  # fmt: skip
def test_paths_that_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        FlowMatchPath(**options)


@pytest.mark.parametrize(("config", "why"), [
    ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler ScoreSdeVeScheduler is not supported"),
    ({"_class_name": FLOW, "use_gamma_sigmas": True}, "with use_gamma_sigmas=True is not supported"),
    ({"_class_name": FLOW, "invert_sigmas": True, "stochastic_sampling": True}, "adds noise at the data's end"),
])  # fmt: skip
def test_schedulers_that_are_refused(config: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        diffusion_node(config)


@pytest.mark.parametrize(("path", "towards", "why"), [
    ({"clean_time": 1.0, "noise_time": 0.0}, "data", "clean_time=1.0, noise_time=0.0"),
    ({}, "data", "its velocity runs with the times"),
    ({"shift_base": 1024}, "noise", "shift_base and margins are no options"),
    ({"dynamic": [100, 0.5, 6400, 1.15]}, "noise", "counts tokens of 64 values"),
])  # fmt: skip
def test_flows_without_a_scheduler(path: dict[str, Any], towards: str, why: str) -> None:
    home = "ldmlab.diffusion."
    schedule = {"_target_": f"{home}flow_match.FlowMatchPath", **path}
    prediction = {"_target_": f"{home}parameterization.VelocityPrediction", "towards": towards}
    with pytest.raises(InputError, match=why):
        scheduler_options({"schedule": schedule, "prediction": prediction})


EDM, EDM_CASES = recorded("diffusers/edm_euler")


@pytest.mark.parametrize("case", EDM_CASES)
def test_the_steps_of_edm_euler(case: str) -> None:
    """EDMEulerScheduler: Euler's steps on EDM's levels from sqrt(sigma^2 + 1) times the noise."""
    one = EDM_CASES[case]
    node = diffusion_node({"_class_name": "EDMEulerScheduler", **one["scheduler"]})
    path, prediction = (instantiate(node[name], where=name) for name in ("schedule", "prediction"))
    grid = path.grid(one["num_inference_steps"])
    assert_near(torch.tensor([level.sigma for level in grid]), EDM[f"{case}.sigmas"], 1e-5)
    assert_near(torch.tensor([level.time for level in grid[:-1]]), EDM[f"{case}.timesteps"], 1e-5)
    form = Parameterization(prediction, path)

    def denoise(x: Tensor, level: Level) -> Tensor:
        """The network runs before noise is added, as the scheduler's `step` receives its output."""
        before, here = (drawn[-1], grid[len(drawn) - 1]) if one["step"] else (x, level)
        assert here.time is not None
        return form.clean(x, field(form.scaled(before, here.alpha, here.sigma), here.time), level)

    def remember(step: int, x: Tensor, clean: Tensor) -> Tensor:
        drawn.append(x)
        return x

    churn = {"s_churn": "churn", "s_tmin": "churn_min", "s_tmax": "churn_max", "s_noise": "churn_noise"}
    sampler: Any = sampler_by_name("euler", **{churn[name]: value for name, value in one["step"].items()})
    x = EDM["x_T"] * one["init_noise_sigma"]
    drawn, noises = [x], []
    assert one["init_noise_sigma"] == pytest.approx(math.hypot(grid[0].sigma, 1))

    def noise(step: int) -> Tensor:
        noises.append(step)
        return drawn_noise(f"noise.{len(noises)}", *x.shape)

    assert_near(sampler.along(path)(denoise, x, grid, noise=noise, after_step=remember), EDM[case])
    assert len(noises) == one["noises_drawn"]
