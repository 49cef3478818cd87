"""EDM's schedulers of diffusers: the same levels, times, inputs and ends as the installed ones, both ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import HOME, describe, kl, unet, weights
from torch import Tensor

from ldmlab.app.cli import dispatch
from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import EdmPrediction, Parameterization
from ldmlab.diffusion.paths import EdmPath
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import SampleSettings, sampler_by_name
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers.diffusers_export import export_folder
from ldmlab.interop.diffusers.diffusers_schedulers import diffusion_node, sampler_node, scheduler_options
from ldmlab.interop.verify import compare_flow
from ldmlab.model_files import ModelFiles
from ldmlab.samplers._auto import Auto

peer = pytest.importorskip("diffusers")

EULER, MULTISTEP = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
RANGE = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 1.0}
LEVELS = [
    {},
    RANGE | {"rho": 5.0},
    RANGE | {"prediction_type": "v_prediction", "sigma_schedule": "exponential"},
    {"final_sigmas_type": "sigma_min"},
]
SOLVERS = [
    {"solver_order": 1},
    {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"},
    {"solver_type": "heun", **RANGE},
    {"solver_order": 3},
    {"solver_order": 3, "rho": 5.0, "lower_order_final": False},
    {"euler_at_final": True, "sigma_schedule": "exponential"},
]
CASES = [(EULER, options) for options in LEVELS] + [(MULTISTEP, options) for options in [*LEVELS, *SOLVERS]]


def network(x: Tensor, time: float) -> Tensor:
    return torch.tanh(x * (0.7 + 0.2 * time)) + 0.1 * time


def form_of(config: dict[str, Any]) -> Parameterization:
    """Our path and prediction for a scheduler's settings."""
    node = diffusion_node(config)
    path, prediction = (instantiate(node[name], where=name) for name in ("schedule", "prediction"))
    return Parameterization(prediction, path)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_same_levels_and_end(name: str, options: dict[str, Any], steps: int, monkeypatch: Any) -> None:
    theirs = getattr(peer, name)(**options)
    theirs.set_timesteps(steps)
    config = {**theirs.config, "_class_name": name}
    form = form_of(config)
    path: Any = form.path
    grid = path.grid(steps)
    torch.testing.assert_close(torch.tensor([level.sigma for level in grid]), theirs.sigmas, rtol=2e-5, atol=0)
    times = torch.tensor([level.time for level in grid[:-1]])
    torch.testing.assert_close(times, theirs.timesteps, rtol=0, atol=1e-5)
    x, *noises = torch.randn(steps + 1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    given = iter(noises)
    module = peer.schedulers.scheduling_edm_dpmsolver_multistep
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(given))

    def denoise(x: Tensor, level: Level) -> Tensor:
        assert level.time is not None
        return form.clean(x, network(form.scaled(x, level.alpha, level.sigma).float(), level.time), level)

    x = x * theirs.init_noise_sigma
    found = [
        sampler(denoise, x, grid, noise=lambda step: noises[step])
        for sampler in (instantiate(sampler_node(config), where="sampler"), Auto().along(path))
    ]
    for time in theirs.timesteps:
        x = theirs.step(network(theirs.scale_model_input(x, time), float(time)), time, x).prev_sample
    assert torch.equal(*found)
    torch.testing.assert_close(found[0], x, rtol=0, atol=5e-5 * max(1.0, float(x.abs().max())))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_auto_is_the_scheduler_s_solver(name: str, options: dict[str, Any]) -> None:
    """`ldmlab sample` without a sampler takes solver and steps from the path."""
    config = {"_class_name": name, **options}
    path = instantiate(diffusion_node(config)["schedule"], where="schedule")
    size = {"size": (8, 8), "guidance_scale": 1.0, "tile": 0, "window": 0}
    settings = SampleSettings().filled(solver=path.solver, levels=None, **size)
    mine, node = sampler_by_name(settings.sampler), sampler_node(config)
    assert vars(mine) == vars(instantiate(node, where="sampler"))
    assert (settings.steps, settings.spacing) == (50, path.solver.spacing)


@pytest.mark.parametrize("solver", [["nosuch", "karras", 5], ["heun:zzz=3", "karras", 5]])
def test_a_solver_that_does_not_exist_is_refused(solver: list[Any]) -> None:
    path = EdmPath(solver=(solver[0], solver[1], solver[2]))
    with pytest.raises(InputError):
        Auto().along(path)


def test_training_target_and_estimate_of_the_other_sign() -> None:
    """v of CosXL: the network's exact output gives the clean latent back."""
    prediction, path = EdmPrediction(1.0, negative=True), EdmPath()
    clean, noise = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1)).unbind()
    times = torch.tensor([-1.0, 0.1, 1.0])
    alpha, sigma = path.levels(times)
    target = prediction.target(clean, noise, alpha, sigma)
    torch.testing.assert_close(target, (noise - sigma * clean) / (sigma**2 + 1).sqrt())
    for row, time in enumerate(times.tolist()):
        x = clean[row] + sigma[row] * noise[row]
        found = prediction.clean(x, target[row], path.level(time))
        torch.testing.assert_close(found.float(), clean[row], atol=2e-4, rtol=0)
    assert bool((prediction.clean_slope(alpha, sigma) < 0).all())


@pytest.mark.parametrize("options", LEVELS)
def test_settings_come_back(options: dict[str, Any]) -> None:
    node = diffusion_node({"_class_name": EULER, **options})
    name, config = scheduler_options(node)
    assert name == EULER
    assert diffusion_node({"_class_name": name, **config}) == node
    path = instantiate(node["schedule"], where="schedule")
    assert compare_flow(path, peer.EDMEulerScheduler(**config), 64) < 1e-5


@pytest.mark.parametrize(("options", "why"), [
    ({"prediction_type": "sample"}, "prediction_type=sample is not supported; supported: epsilon or v_prediction"),
    ({"thresholding": True}, "thresholding=True is not supported"),
    ({"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}, "solver_order=3, algorithm_type=sde-dpmsolver"),
])  # fmt: skip
def test_what_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(InputError, match=why):
        diffusion_node({"_class_name": MULTISTEP, **options})


@torch.no_grad()
def test_a_folder_is_imported_and_samples_as_its_network_does(tmp_path: Path) -> None:
    """A network of pixels under EDMEulerScheduler: the images of `ldmlab sample` are those of diffusers' loop."""
    net = {"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 8, "attention_head_dim": None}
    blocks = {"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]}
    torch.manual_seed(0)
    unet = peer.UNet2DModel(**net, **blocks).eval()
    options = {"sigma_max": 20.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
    theirs = peer.DDPMPipeline(unet=unet, scheduler=peer.EDMEulerScheduler(**options))
    theirs.save_pretrained(tmp_path / "p")
    assert dispatch(["import", str(tmp_path / "p"), str(tmp_path / "model")]) == 0
    import ldmlab

    ours = ldmlab.load(tmp_path / "model")
    settings = ours.resolved(SampleSettings(steps=6))
    assert (settings.sampler, settings.spacing) == ("euler", "karras:7")
    x = ours.begin([{}, {}], settings, [0, 1])
    first = ours.grid(settings)[0]
    assert first.spread == pytest.approx(theirs.scheduler.init_noise_sigma, rel=1e-12)
    torch.testing.assert_close(x, first.spread * ours.diffusion.start(torch.tensor([0, 1]), (8, 8), settings.seed))
    found = ours.sample_batch([{}, {}], settings, 0)
    scheduler = theirs.scheduler
    scheduler.set_timesteps(6)
    for time in scheduler.timesteps:
        x = scheduler.step(unet(scheduler.scale_model_input(x, time), time).sample, time, x).prev_sample
    images = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1)
    assert int((images.int() - found.int()).abs().max()) <= 1
    assert found.float().std() > 5


def test_a_model_on_edm_s_path_is_exported_with_its_scheduler(tmp_path: Path) -> None:
    path = {"_target_": f"{HOME}diffusion.paths.EdmPath", "sigma_max": 40.0, "solver": ["heun", "karras:5", 18]}
    spec = describe(kl(3), unet(4, head_channels=16), prediction="EdmPrediction", schedule=path)
    what, differences = export_folder(ModelFiles(tmp_path, spec, weights(spec), "raw"), tmp_path / "out")
    assert what.startswith("modules")
    assert max(differences.values()) < 2e-5
    scheduler = peer.EDMEulerScheduler.from_pretrained(tmp_path / "out" / "scheduler")
    assert (scheduler.config.sigma_max, scheduler.config.rho) == (40.0, 5.0)
