"""The sampler of an imported folder is its scheduler's, on its steps, with its ends; another one is a note."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ldmlab.app.cli import dispatch
from ldmlab.build import load
from ldmlab.contracts import Denoise, Level
from ldmlab.diffusion.parameterization import Parameterization
from ldmlab.diffusion.paths import EdmPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.instantiate import instantiate
from ldmlab.interop.diffusers import notes_of
from ldmlab.interop.diffusers.diffusers_schedulers import clips, diffusion_node, is_replaced, sampler_node
from ldmlab.interop.diffusers.diffusers_solvers import other_steps
from ldmlab.samplers._auto import solver_of

peer = pytest.importorskip("diffusers")

DDPM = {
    **{"block_out_channels": [32, 64], "layers_per_block": 1, "sample_size": 8, "attention_head_dim": None},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6},
}
ENDS = [{"final_sigmas_type": "sigma_min"}, {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}]


def output(x: torch.Tensor, time: float) -> torch.Tensor:
    """A network, as schedulers know it."""
    return torch.tanh(x * (0.5 + time / 1000))


def estimate(form: Any) -> Denoise:
    """Its clean estimates by a prediction of ours."""

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        assert level.time is not None
        clean: torch.Tensor = form.clean(x, output(x, level.time), level)
        return clean

    return denoise


@pytest.mark.parametrize("end", [*ENDS, {"use_exponential_sigmas": True, **ENDS[0]}, {"use_lu_lambdas": True}])
@pytest.mark.parametrize("steps", [1, 6])
@pytest.mark.parametrize("options", [
    {"solver_order": 1},
    {"solver_order": 1, "algorithm_type": "dpmsolver", **ENDS[0], "rescale_betas_zero_snr": False},
    {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"},
    {"algorithm_type": "sde-dpmsolver++", "timestep_spacing": "leading", "steps_offset": 1},
])  # fmt: skip
def test_orders_and_ends_of_a_multistep_solver(
    options: dict[str, Any], steps: int, end: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise levels and the sampler of a folder give diffusers' end; its times may be whole ones."""
    theirs = peer.DPMSolverMultistepScheduler(**end | options)
    theirs.set_timesteps(steps)
    config = {**theirs.config, "_class_name": type(theirs).__name__}
    built = diffusion_node(config)
    schedule, prediction = (instantiate(built[name], where=name) for name in ("schedule", "prediction"))
    sampler = instantiate(sampler_node(config), where="sampler")
    grid = schedule.grid(steps, sampler.spacing)
    whole = {level.time: float(time) for level, time in zip(grid[:-1], theirs.timesteps, strict=True)}
    assert all(abs(ours - time) <= 1 for ours, time in whole.items())
    x, *noises = torch.randn(steps + 1, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    given = iter(noises)
    module = peer.schedulers.scheduling_dpmsolver_multistep
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(given))

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        return prediction.clean(x, output(x, whole[level.time]), level)

    found = sampler(denoise, x, grid, noise=lambda step: noises[step])
    for time in theirs.timesteps:
        x = theirs.step(output(x, float(time)), time, x).prev_sample
    assert float((found - x).abs().max()) <= 5e-5 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize("steps", [10, 30])
@pytest.mark.parametrize("options", [
    {},
    {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    {"steps_offset": 1, "set_alpha_to_one": False},
])  # fmt: skip
def test_ddim_visits_the_times_of_its_scheduler(options: dict[str, Any], steps: int) -> None:
    """From 0 up and ending at the data, as with DiT; or from 1 up and ending at the first level, as with LDM's code."""
    if options.get("steps_offset") and steps == 30:
        return  # which LDM's rule does not take
    theirs = peer.DDIMScheduler(clip_sample=False, **options)
    theirs.set_timesteps(steps)
    config = {**theirs.config, "_class_name": "DDIMScheduler"}
    node = diffusion_node(config)
    schedule, prediction = (instantiate(node[part], where=part) for part in ("schedule", "prediction"))
    sampler: Any = instantiate(sampler_node(config), where="sampler")
    grid = schedule.grid(steps, sampler.spacing)
    assert [level.time for level in grid[:-1]] == theirs.timesteps.tolist()

    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = sampler(estimate(prediction), x, grid, noise=torch.zeros_like)
    if 1000 % steps == 0 or sampler.spacing != "trailing":  # whose steps do not end there where the next one begins
        for time in theirs.timesteps:
            x = theirs.step(output(x, float(time)), time, x).prev_sample
        assert float((found - x).abs().max()) <= 5e-5 * max(1.0, float(x.abs().max()))


FLOWS: list[tuple[str, dict[str, Any], bool]] = [  # class, options, whether a pipeline hands over 1 .. 1 / steps
    ("Heun", {"shift": 3.0}, False),
    ("Heun", {"num_train_timesteps": 100}, False),
    ("Euler", {"use_dynamic_shifting": True, "shift_terminal": 0.1}, True),
    ("Euler", {"shift": 3.0, "use_karras_sigmas": True, "invert_sigmas": True}, True),
    ("Euler", {"shift": 6.0, "use_beta_sigmas": True, "shift_terminal": 0.02}, True),
]


@pytest.mark.parametrize("steps", [2, 9])
@pytest.mark.parametrize(("kind", "options", "handed"), FLOWS)
def test_flows_end_where_their_schedulers_end(kind: str, options: dict[str, Any], handed: bool, steps: int) -> None:
    name = f"FlowMatch{kind}DiscreteScheduler"
    theirs = getattr(peer, name)(**options)
    more = {"mu": 1.15} if "use_dynamic_shifting" in options else {}
    theirs.set_timesteps(steps, **more, **({"sigmas": [1 - i / steps for i in range(steps)]} if handed else {}))
    config = {**theirs.config, "_class_name": name}
    node = diffusion_node(config, 1)
    path, prediction = (instantiate(node[part], where=part) for part in ("schedule", "prediction"))
    solver = solver_of(path, {"origin": {}, "sampler": sampler_node(config)})
    path = path.at_size(4096)  # the size whose mu is 1.15
    grid, form = path.grid(steps, "linspace" if handed else solver.spacing), Parameterization(prediction, path)

    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    sampler: Any = SampleSettings(sampler=solver.sampler).build_sampler()
    found = sampler.along(path)(estimate(form), x, grid, noise=torch.zeros_like)
    for time in theirs.timesteps:
        x = theirs.step(output(x, float(time)), time, x).prev_sample
    assert float((found - x).abs().max()) <= 5e-5 * max(1.0, float(x.abs().max()))


@pytest.mark.parametrize(("config", "replaced"), [
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, False),
    ({"_class_name": "DDIMScheduler"}, False),
    ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, False),
    ({"_class_name": "PNDMScheduler"}, True),
    ({"_class_name": "DPMSolverMultistepScheduler"}, False),
    ({"_class_name": "DPMSolverMultistepScheduler", "use_beta_sigmas": True}, True),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, True),
    ({"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -5.1}, True),
])  # fmt: skip
def test_a_replaced_solver_is_known(config: dict[str, Any], replaced: bool) -> None:
    assert is_replaced(config) is replaced


def test_limits_of_clean_estimates_are_known() -> None:
    """Which samplers here do not have; an import says so."""
    for name in ("DDIM", "DDPM", "DPMSolverMultistep"):
        config = getattr(peer, f"{name}Scheduler")().config
        assert clips({**config, "_class_name": f"{name}Scheduler"}) is (name != "DPMSolverMultistep")
        assert not clips({**config, "_class_name": f"{name}Scheduler", "clip_sample": False})
    assert clips({"_class_name": "DPMSolverMultistepScheduler", "thresholding": True})
    assert "clips every clean estimate (clip_sample)" in notes_of({"origin": {"clips": True}})[0]
    assert notes_of({"origin": {}}) == ()


@pytest.mark.parametrize(
    ("spacing", "offset", "alpha_one", "other"),
    [
        ("leading", 1, False, False),
        ("leading", 0, True, False),
        ("trailing", 0, True, False),
        ("trailing", 1, False, True),
        ("leading", 1, True, True),
        ("leading", 0, False, True),
        ("linspace", 0, True, True),
    ],
)
def test_steps_that_ddim_here_does_not_have_are_known(spacing: str, offset: int, alpha_one: bool, other: bool) -> None:
    config = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": alpha_one}
    for name in ("DDIMScheduler", "DDIMParallelScheduler"):
        assert other_steps({"_class_name": name, **config}) is other
    assert not other_steps({"_class_name": "PNDMScheduler", **config})
    assert "steps (timestep_spacing" in notes_of({"origin": {"other_steps": True}})[0]


def test_auto_has_the_options_and_the_spacing_of_an_imported_sampler() -> None:
    """Each of which a setting overrides; runs have their path's sampler, continuous paths their spacing."""
    config = {"_class_name": "DPMSolverMultistepScheduler", "euler_at_final": True}
    spec, path = {"sampler": sampler_node(config), "origin": {}}, Schedule()
    known = {"levels": 1000, "size": (8, 8), "guidance_scale": 1.0, "tile": 0, "window": 0}
    found = SampleSettings().filled(solver=solver_of(path, spec), **known)
    name = "dpmpp_2m_sde:eta=0.0:lower_order_final=true:euler_at_final=true"
    assert (found.sampler, found.spacing, found.steps) == (name, "linspace:open", 50)
    assert vars(found.build_sampler()) | {"spacing": found.spacing} == vars(
        instantiate(spec["sampler"], where="sampler")
    )
    chosen = SampleSettings(eta=0.7, steps=5, spacing="karras").filled(solver=solver_of(path, spec), **known)
    assert (chosen.eta, chosen.steps, chosen.spacing) == (0.7, 5, "karras")
    assert vars(chosen.build_sampler())["euler_at_final"]
    assert solver_of(path, {"sampler": spec["sampler"]}) == path.solver
    assert solver_of(EdmPath(), spec).spacing == EdmPath().solver.spacing


@pytest.mark.slow
@torch.no_grad()
def test_auto_is_the_sampler_of_an_imported_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its options and spacing, each of which a setting overrides; another solver is named by a note."""
    torch.manual_seed(0)
    schedulers = {
        "sde": peer.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", euler_at_final=True),
        "other": peer.PNDMScheduler(),
        "ddim": peer.DDIMScheduler(timestep_spacing="trailing", clip_sample=False),
    }
    found = {}
    for name, scheduler in schedulers.items():
        pipeline = peer.DDPMPipeline(unet=peer.UNet2DModel(**DDPM).eval(), scheduler=scheduler)
        pipeline.save_pretrained(tmp_path / name)
        assert dispatch(["import", str(tmp_path / name), str(tmp_path / f"{name}_model")]) == 0
        said = capsys.readouterr().out
        assert ("note: the solver of PNDMScheduler is replaced by ddim" in said) == (name == "other")
        assert "clip_sample" not in said
        found[name] = load(tmp_path / f"{name}_model")
    sde = found["sde"].resolved(SampleSettings())
    assert (sde.sampler, sde.spacing, sde.steps) == (
        "dpmpp_2m_sde:lower_order_final=true:euler_at_final=true",
        "linspace:open",
        50,
    )
    assert vars(sde.build_sampler())["euler_at_final"]
    changed = found["sde"].resolved(SampleSettings(eta=0.0, steps=5, spacing="karras"))
    assert (changed.eta, changed.steps, changed.spacing) == (0.0, 5, "karras")
    assert found["sde"].resolved(SampleSettings(sampler="heun")).sampler == "heun"
    assert found["ddim"].resolved(SampleSettings()).spacing == "trailing"
    assert found["other"].resolved(SampleSettings()).sampler == "ddim"
