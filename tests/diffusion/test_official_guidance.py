"""Guided runs of official programs again: REPA, EDM2, DiT, SiT, LightningDiT, and the rescaling of diffusers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from drawn_weights import drawn
from ldmlab.contracts import Conditioning, Level
from ldmlab.diffusion.diffusion_loss import VariationalLoss
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EdmPrediction, EpsPrediction, LearnedVariance, VelocityPrediction
from ldmlab.diffusion.paths import CosinePath, EdmPath, LinearPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.first_stages.identity import Identity
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.interop import dit, lightningdit, sit
from modern_cases import assert_near, drawn_noise, field, recorded

ASSETS = Path(__file__).parents[1] / "assets/reference/modern"
END = Level(1.0, 0.0, None)


class Field(nn.Module):
    """The programs' stand-in for a network; `weak`: EDM2's for a guiding one."""

    accepts = frozenset({"vector"})

    def __init__(self, weak: bool = False) -> None:
        super().__init__()
        self.factor, self.shift = (0.7, 0.2) if weak else (1.0, 0.0)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        vector = conditioning.vector
        return self.factor * field(x.float(), t + self.shift, None if vector is None else vector[:, 0])


def model(path: Any, prediction: Any, backbone: nn.Module) -> LatentDiffusion:
    loss: Any = VariationalLoss() if isinstance(prediction, LearnedVariance) else "l2"
    parts = {"schedule": path, "prediction": prediction, "guidance_trained": True, "loss": loss}
    return LatentDiffusion(Identity(), LatentScale(), backbone, {}, **parts).eval()


def told(values: Tensor | None) -> Conditioning:
    return Conditioning(vector=None if values is None else values[:, None])


def by_number(shape: Any, count: int, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """The noises of a recorded run, of its first `count` images."""
    return lambda step: drawn_noise(f"noise.{step + 1}", *shape)[:count].to(dtype)


REPA, REPA_CASES = recorded("repa/samplers")
GUIDED = [case for case in REPA_CASES if REPA_CASES[case].get("cfg_scale", 1.0) != 1]


@pytest.mark.parametrize("case", GUIDED)
def test_samplers_of_repa_with_their_intervals(case: str) -> None:
    """Euler, Heun, whose second slope is guided where the step begins inside, and Euler-Maruyama."""
    one, x = REPA_CASES[case], REPA["x_T"].double()
    path = (CosinePath if one.get("path_type") == "cosine" else LinearPath)(0.0, 1.0)
    labels = 0.5 * REPA["y"].float() - 0.7
    guidance = Guidance(one["cfg_scale"], (one["guidance_low"], one["guidance_high"]))
    made = model(path, VelocityPrediction(), Field())
    denoise = made.denoiser(told(labels), told(torch.zeros_like(labels)), guidance)
    noise = by_number(x.shape, len(x), x.dtype)
    if one["function"] == "euler_sampler":
        grid = path.grid(one["num_steps"])
        sampler: Any = sampler_by_name("ode", method="heun2" if one["heun"] else "euler").along(path)  # type: ignore
        if one["heun"]:  # its last step is Euler's
            x = sampler(denoise, x, grid[:-1], noise=noise)
            grid, sampler = grid[-2:], sampler_by_name("ode", method="euler").along(path)  # type: ignore
    else:
        sampler = sampler_by_name("sde", form="linear").along(path)  # type: ignore[attr-defined]
        times = torch.linspace(1, 0.04, one["num_steps"], dtype=torch.float64).tolist()
        grid = [*(path.level(time) for time in times), END]
    assert_near(sampler(denoise, x, grid, noise=noise), REPA[case])


EDM2, EDM2_CASES = recorded("edm2/samplers")
CHURN = {"S_churn": "churn", "S_min": "churn_min", "S_max": "churn_max", "S_noise": "churn_noise"}


@pytest.mark.parametrize("case", [case for case in EDM2_CASES if "guidance" in EDM2_CASES[case]])
def test_autoguidance_of_edm2(case: str) -> None:
    """The guiding network is another one, with the same class or none; below 1 the output is moved towards it."""
    one, x, counted = EDM2_CASES[case], EDM2["x_T"], []
    weak = model(EdmPath(), EdmPrediction(0.5), Field(weak=True))
    guidance = Guidance(one["guidance"], weak=weak)
    classes = told(EDM2["c"] if one["labels"] else None)
    denoise = model(EdmPath(), EdmPrediction(0.5), Field()).denoiser(classes, classes, guidance)

    def noise(step: int) -> Tensor:
        counted.append(step)
        return drawn_noise(f"noise.{len(counted)}", *x.shape)

    grid = EdmPath().grid(one["num_steps"], "karras")
    sampler: Any = sampler_by_name("heun", **{ours: one[name] for name, ours in CHURN.items() if name in one})
    assert_near(sampler.along(EdmPath())(denoise, x * grid[0].sigma, grid, noise=noise), EDM2[case])


DIFFUSERS, _ = recorded("diffusers/ddpm_family")


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_rescaling_of_diffusers(rescale: float) -> None:
    """`rescale_noise_cfg`."""
    guided, text = DIFFUSERS["cfg_rescale.cfg"], DIFFUSERS["cfg_rescale.text"]
    assert_near(Guidance(rescale=rescale).corrected(guided, text), DIFFUSERS[f"cfg_rescale.{rescale}"])


CASES: dict[str, dict[str, Any]] = json.loads((ASSETS / "transformers.json").read_text())
PROGRAMS: dict[str, Any] = {"dit": dit, "sit": sit, "lightningdit": lightningdit}


def official(case: str) -> tuple[LatentDiffusion, Callable[[Tensor], Conditioning], dict[str, Tensor]]:
    """Our model around the official network, its table of classes, and what was recorded."""
    one, found = CASES[case], load_file(ASSETS / f"{case}.safetensors")
    network = PROGRAMS[one["kind"]].as_official(
        one["config"], drawn(one) | {k: found[f"kept.{k}"] for k in one["kept"]}
    )
    path: Any = LinearPath(1.0, 0.0)
    prediction: Any = VelocityPrediction("data")
    if one["kind"] == "dit":
        learned = one["config"].get("learn_sigma", True)
        path, prediction = Schedule("linear", 1e-4, 0.02), EpsPrediction()
        prediction = LearnedVariance(prediction) if learned else prediction
    made = model(path, prediction, network.network)
    return made, lambda y: Conditioning(vector=network.labels.embedding(y)), found


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]["kind"] in PROGRAMS])
@torch.no_grad()
def test_guided_channels_of_the_transformers(case: str) -> None:
    """`forward_with_cfg` guides three channels; what it gives for the others is the output with the class."""
    made, label, found = official(case)
    half = len(found["cfg_x"]) // 2
    x, classes, none = found["cfg_x"][:half], *(label(y) for y in found["cfg_y"].chunk(2))
    outputs = [made.output(conditions) for conditions in (classes, none)]
    for row, time in enumerate(found["cfg_t"][:half].tolist()):  # each has a time of its own
        level = made.path.level(time)
        pair = [output(x, level)[0][row : row + 1] for output in outputs]
        for scale in CASES[case]["arguments"]["cfg_scales"]:
            for channels, name in ((3, "cfg3"), (None, "cfgall")):
                guided = Guidance(channels=channels).corrected(torch.lerp(pair[1], pair[0], scale), pair[0])
                assert_near(guided, found[f"{name}.{scale}"][row : row + 1, : x.shape[1]])


@torch.no_grad()
def test_a_guided_sample_of_dit() -> None:
    """p_sample_loop over forward_with_cfg: five of the levels, the learned variance, three channels guided."""
    made, label, found = official("dit_p2_sigma")
    scale, learned = CASES["dit_p2_sigma"]["arguments"]["sample_cfg"], list[Tensor]()
    x, (classes, none) = found["z"][:2], (label(y) for y in found["cfg_y"].chunk(2))
    denoise = made.denoiser(classes, none, Guidance(scale, channels=3), learned)
    sampler: Any = sampler_by_name("ddpm").with_variance(learned)  # type: ignore[attr-defined]
    grid = made.path.grid(5, "linspace")
    assert_near(sampler(denoise, x, grid, noise=by_number(found["z"].shape, 2, x.dtype)), found["sample"][:2])


@pytest.mark.parametrize(("case", "shift", "interval"), [
    ("sit_p2_sigma", 1.0, None),
    ("ldit_released", 1 / 0.3, (0.0, 1 - 0.11)),  # guided where its time, which runs to the data, is 0.11 and above
])  # fmt: skip
@torch.no_grad()
def test_guided_samples_of_flows(case: str, shift: float, interval: Any) -> None:
    made, label, found = official(case)
    scale, times = CASES[case]["arguments"]["cfg_scales"][0], CASES[case]["arguments"]["ode"]
    path = made.path.with_shift(shift)
    x, (classes, none) = found["cfg_x"][:2], (label(y) for y in found["cfg_y"].chunk(2))
    denoise = made.denoiser(classes, none, Guidance(scale, interval, channels=3))
    sampler: Any = sampler_by_name("ode", method="euler").along(path)  # type: ignore[attr-defined]
    assert_near(sampler(denoise, x, path.grid(times - 1), noise=lambda step: x), found["ode_sample"][:2])
