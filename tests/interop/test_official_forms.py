"""Official forms guide, sample and train as the official programs do, give their tensors back, and refuse others."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from drawn_weights import drawn
from ldmlab.contracts import Level
from ldmlab.diffusion.alignment import Alignment
from ldmlab.diffusion.diffusion_loss import Objective
from ldmlab.diffusion.parameterization import EpsPrediction, Parameterization, VelocityPrediction
from ldmlab.diffusion.paths import CosinePath, LinearPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.diffusion.time_sampling import LogNormalSigma, UniformTimes
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.instantiate import instantiate
from ldmlab.interop import dit, edm, edm2, lightningdit, repa, sit
from modern_cases import ASSETS, assert_near, drawn_noise

TRANSFORMERS: dict[str, dict[str, Any]] = json.loads((ASSETS / "transformers.json").read_text())
EDM2: dict[str, dict[str, Any]] = json.loads((ASSETS / "edm2.json").read_text())
EDM2_NETWORKS = [name for name in EDM2 if "keys" in EDM2[name]]
PROGRAMS: dict[str, Any] = {"dit": dit, "sit": sit, "lightningdit": lightningdit, "repa": repa, "edm2": edm2}


def recorded(name: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    """The network of a case, its tensors and its arguments."""
    case, tensors = TRANSFORMERS[name], load_file(ASSETS / f"{name}.safetensors")
    model = PROGRAMS[case["kind"]].as_official(
        case["config"], drawn(case) | {key: tensors[f"kept.{key}"] for key in case["kept"]}
    )
    return model, tensors, case["arguments"]


@torch.no_grad()
def test_a_guided_sample_of_dit() -> None:
    """p_sample_loop over forward_with_cfg, with the learned variance."""
    model, tensors, arguments = recorded("dit_p2_sigma")
    learned: list[Tensor] = []

    def denoise(x: Tensor, level: Level) -> Tensor:
        out = model.forward_with_cfg(x, torch.full((len(x),), level.time), tensors["cfg_y"], arguments["sample_cfg"])
        mean, learned[:] = out[:, :4], [out[:, 4:]]
        return EpsPrediction().clean(x, mean, level)

    z = tensors["z"]
    grid = Schedule("linear", 0.0001, 0.02).grid(int(arguments["respacing"]), "linspace")
    sampler: Any = sampler_by_name("ddpm")
    noise = [drawn_noise(f"noise.{i + 1}", *z.shape) for i in range(len(grid))]
    assert_near(sampler.with_variance(learned)(denoise, z, grid, noise=noise.__getitem__), tensors["sample"])


@pytest.mark.parametrize("name", ["sit_p2_sigma", "ldit_released"])
@torch.no_grad()
def test_a_guided_sample_of_a_flow(name: str) -> None:
    """Euler's method over forward_with_cfg; LightningDiT shifts the times and guides an interval of them."""
    model, tensors, arguments = recorded(name)
    shift = arguments.get("timestep_shift", 1.0)
    path = LinearPath(1.0, 0.0).with_shift(1 / shift)  # theirs is of times that run to the data
    form = Parameterization(VelocityPrediction("data"), path)
    interval = (True, arguments["interval_start"]) if "interval_start" in arguments else ()

    def denoise(x: Tensor, level: Level) -> Tensor:
        t = torch.full((len(x),), level.time)
        return form.clean(
            x, model.forward_with_cfg(x, t, tensors["cfg_y"], arguments["cfg_scales"][0], *interval), level
        )

    sampler: Any = sampler_by_name("ode", method="euler")
    x, grid = tensors["cfg_x"], path.grid(arguments["ode"] - 1)
    assert_near(sampler.along(path)(denoise, x, grid, noise=lambda step: x), tensors["ode_sample"])


@pytest.mark.parametrize("name", EDM2_NETWORKS)
def test_edm2_gives_its_tensors_back(name: str) -> None:
    case = EDM2[name]
    tensors = load_file(ASSETS / f"{name}.safetensors")
    state = drawn(case) | {key: tensors[f"kept.{key}"] for key in case["kept"]}
    given_back = edm2.as_official(case["config"], state).official_state()
    assert given_back.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in given_back.items())


@pytest.mark.parametrize("program", PROGRAMS)
def test_arguments_that_the_official_class_lacks_are_refused(program: str) -> None:
    case = EDM2["edm2_narrow"] if program == "edm2" else next(c for c in TRANSFORMERS.values() if c["kind"] == program)
    with pytest.raises(InputError, match="width is no argument of the official network; arguments: "):
        PROGRAMS[program].as_official({**case["config"], "width": 64}, drawn(case))


def test_blocks_that_repa_lacks_are_refused() -> None:
    case = TRANSFORMERS["repa_sit"]
    with pytest.raises(InputError, match=r"encoder_depth=5 is no block of 1 \.\. 4"):
        repa.as_official({**case["config"], "encoder_depth": 5}, drawn(case))
    with pytest.raises(InputError, match="decoder_hidden_size=768 must be hidden_size=64"):
        repa.as_official({**case["config"], "decoder_hidden_size": 768}, drawn(case))


REPA_LOSSES = [(name, loss) for name, case in TRANSFORMERS.items() for loss in case["arguments"].get("losses", [])]


@pytest.mark.parametrize(("name", "loss"), REPA_LOSSES)
def test_training_of_repa(name: str, loss: str) -> None:
    """Its times, denoising losses and alignment, and gradients of both through the network and our projectors."""
    model, tensors, arguments = recorded(name)
    config, side = TRANSFORMERS[name]["config"], tensors["images"].shape[2] // model.network.size_step
    widths = {str(i): width for i, width in enumerate(config["z_dims"])}
    alignment = Alignment(
        model.network, widths, (16, 16), hidden=config["projector_dim"], block=config["encoder_depth"]
    )
    alignment.projectors.parts.load_state_dict(model.projectors.state_dict())
    features = {
        f"states.encoder.{i}": tensors[f"target.{i}"].transpose(1, 2).unflatten(2, (side, side)) for i in widths
    }
    settings, images = arguments["losses"][loss], tensors["images"]
    path = (CosinePath if settings["path_type"] == "cosine" else LinearPath)(0.0, 1.0)
    objective = Objective(path, VelocityPrediction())
    u = torch.special.ndtr(drawn_noise("noise.1", len(images), 1, 1, 1).flatten().double())
    times = LogNormalSigma(0.0, 1.0) if settings["weighting"] == "lognormal" else UniformTimes()
    t = times(u, torch.zeros(len(images), dtype=torch.int64), path)
    assert_near(t, tensors[f"loss.{loss}.t"])
    with alignment.watching() as seen:
        noise = drawn_noise("noise.2", *images.shape)
        denoising = objective(lambda x, t: model(x, t, tensors["y"])[0], images, noise, t)
        projection = alignment(seen[-1], features)
    assert_near(denoising, tensors[f"loss.{loss}.denoising"])
    assert_near(projection[None], tensors[f"loss.{loss}.projection"])
    (denoising.mean() + arguments["proj_coeff"] * projection).backward()
    gradients = model.official_gradients()
    assert_near(gradients["blocks.0.attn.qkv.bias"], tensors[f"loss.{loss}.grad_first_block_qkv_bias"])
    last = dict(alignment.projectors.named_parameters())["parts.0.4.bias"].grad
    assert last is not None
    assert_near(last, tensors[f"loss.{loss}.grad_projector_last_bias"])
    with alignment.watching() as seen, torch.no_grad():
        model(tensors["x"], tensors["t"], tensors["y"])
        for i, found in alignment.projectors(seen[-1]).items():
            assert_near(found.flatten(2).transpose(1, 2), tensors[f"z_tilde.{i}"])


@pytest.mark.parametrize("precond", edm.PRECONDS)
def test_paths_and_predictions_of_edms_classes_are_built(precond: str) -> None:
    nodes = edm.diffusion_nodes({"precond": precond, "M": 500})
    built = {name: instantiate(node, where=f"diffusion.{name}") for name, node in nodes.items()}
    assert Objective(**built).path.grid(4, "auto")
    if precond == "iDDPMPrecond":
        assert (built["schedule"].name, built["schedule"].steps, built["prediction"].outputs) == ("cosine", 500, 2)
