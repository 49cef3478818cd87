"""`as_official` of each family takes any legal configuration, guides and samples as the official programs do.

Names and shapes of official tensors follow from the configuration by `official_shapes`, which the recorded state dicts
check.
"""

import json
import random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from conf_files import conf_node
from drawn_weights import drawn, weight_by_rule
from ldmlab.contracts import Level
from ldmlab.diffusion.parameterization import EpsPrediction, Parameterization, VelocityPrediction
from ldmlab.diffusion.paths import LinearPath
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.interop import class_models, dit, edm2, lightningdit, repa, sit
from modern_cases import ASSETS, assert_near, drawn_noise

TRANSFORMERS: dict[str, dict[str, Any]] = json.loads((ASSETS / "transformers.json").read_text())
EDM2: dict[str, dict[str, Any]] = json.loads((ASSETS / "edm2.json").read_text())
EDM2_NETWORKS = [name for name in EDM2 if "keys" in EDM2[name]]
PROGRAMS: dict[str, Any] = {"dit": dit, "sit": sit, "lightningdit": lightningdit, "repa": repa, "edm2": edm2}
Shapes = dict[str, list[int]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def official_shapes(program: str, config: dict[str, Any]) -> Shapes:
    """The state dict of an official transformer."""
    of = {"mlp_ratio": 4.0} | config
    width, patch, channels, heads = (of[k] for k in ("hidden_size", "patch_size", "in_channels", "num_heads"))
    side, hidden = of["input_size"] // patch, int(width * of["mlp_ratio"])
    learned = of.get("learn_sigma", program != "lightningdit") and program != "repa"
    shapes: Shapes = {
        "pos_embed": [1, side**2, width],
        "x_embedder.proj.weight": [width, channels, patch, patch],
        "x_embedder.proj.bias": [width],
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        "y_embedder.embedding_table.weight": [of["num_classes"] + (of["class_dropout_prob"] > 0), width],
    }
    if of.get("use_rope"):
        shapes |= {f"feat_rope.freqs_{part}": [side**2, width // heads] for part in ("cos", "sin")}
    for i in range(of["depth"]):
        shapes |= block_shapes(f"blocks.{i}.", of, hidden)
    for i, z_dim in enumerate(of.get("z_dims", [])):
        middle = of["projector_dim"]
        for layer, rows, columns in ((0, middle, width), (2, middle, middle), (4, z_dim, middle)):
            shapes |= linear(f"projectors.{i}.{layer}", rows, columns)
    if of.get("use_rmsnorm"):
        shapes |= {"final_layer.norm_final.weight": [width]}
    shapes |= linear("final_layer.linear", (1 + learned) * channels * patch**2, width)
    return shapes | linear("final_layer.adaLN_modulation.1", 2 * width, width)


def block_shapes(at: str, of: dict[str, Any], hidden: int) -> Shapes:
    width = of["hidden_size"]
    shapes = linear(f"{at}attn.qkv", 3 * width, width) | linear(f"{at}attn.proj", width, width)
    for name in ("q_norm", "k_norm") if of.get("use_qknorm") or of.get("qk_norm") else ():
        leaves = ("weight",) if of.get("use_rmsnorm") else ("weight", "bias")
        shapes |= {f"{at}attn.{name}.{leaf}": [width // of["num_heads"]] for leaf in leaves}
    if of.get("use_rmsnorm"):
        shapes |= {f"{at}norm1.weight": [width], f"{at}norm2.weight": [width]}
    if of.get("use_swiglu"):
        gated = int(2 / 3 * hidden)
        shapes |= linear(f"{at}mlp.w12", 2 * gated, width) | linear(f"{at}mlp.w3", width, gated)
    else:
        shapes |= linear(f"{at}mlp.fc1", hidden, width) | linear(f"{at}mlp.fc2", width, hidden)
    return shapes | linear(f"{at}adaLN_modulation.1", (4 if of.get("wo_shift") else 6) * width, width)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_shapes_follow_from_the_configuration(name: str) -> None:
    case = TRANSFORMERS[name]
    assert official_shapes(case["kind"], case["config"]) == case["keys"]


def any_config(program: str, choose: random.Random) -> dict[str, Any]:
    """A legal configuration of a small network."""
    heads, patch = choose.choice([1, 2, 3, 5]), choose.choice([1, 2, 4, 8])
    config = {
        **{
            "input_size": patch * choose.randint(1, 3),
            "patch_size": patch,
            "in_channels": choose.choice([1, 3, 4, 16]),
        },
        **{"hidden_size": heads * choose.choice([4, 8, 12, 16]), "depth": choose.randint(1, 3), "num_heads": heads},
        **{"mlp_ratio": choose.choice([1.0, 2.5, 3.3, 4.0]), "num_classes": choose.randint(1, 9)},
        "class_dropout_prob": choose.choice([0.0, 0.1, 0.5]),
    }
    if program != "repa":
        config["learn_sigma"] = choose.choice([True, False])
    if program == "lightningdit":
        for option in ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift"):
            config[option] = choose.choice([True, False])
    if program == "repa":
        config |= {"z_dims": choose.choice([[8], [5, 6], [3, 3, 2]]), "projector_dim": choose.choice([8, 20])}
        config |= {"encoder_depth": choose.randint(1, config["depth"]), "qk_norm": choose.choice([True, False])}
        config |= {"decoder_hidden_size": config["hidden_size"], "path_type": "linear", "fused_attn": True}
    return config


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("program", ["dit", "sit", "lightningdit", "repa"])
@torch.no_grad()
def test_any_legal_configuration(program: str, seed: int) -> None:
    """It takes exactly the official tensors, gives them back, runs, and import derives the arguments from them."""
    config = any_config(program, random.Random(f"{program}{seed}"))
    state = {name: weight_by_rule(name, shape, seed) for name, shape in official_shapes(program, config).items()}
    model = PROGRAMS[program].as_official(config, state)
    given_back = model.official_state()
    constants = {name for name in state if name == "pos_embed" or name.startswith("feat_rope")}
    assert given_back.keys() | constants == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in given_back.items())
    channels, side = config["in_channels"], config["input_size"]
    x, t, y = torch.randn(2, channels, side, side), torch.rand(1).expand(2), torch.zeros(2, dtype=torch.int64)
    out = model(x, t, y)
    if program == "repa":
        out, projected = out
        assert [list(z.shape) for z in projected] == [
            [2, (side // config["patch_size"]) ** 2, n] for n in config["z_dims"]
        ]
    doubled = 2 if program == "dit" and config["learn_sigma"] else 1
    assert out.shape == (2, doubled * channels, side, side)
    assert out.isfinite().all()
    found = class_models.PROGRAMS[program].config(state, {"class_dropout_prob": config["class_dropout_prob"]})
    heads = {name: config[name] for name in ("num_heads", "class_dropout_prob")}
    assert official_shapes(program, found | heads) == official_shapes(program, config)
    if program != "repa":
        assert torch.allclose(model.forward_with_cfg(x, t, y, 3.0), model(x[[0, 0]], t, y), atol=1e-5)  # of one class


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


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_presets_have_the_official_sizes(preset: str, patch: int) -> None:
    """Every tensor of DiT and SiT S, B, L, XL at 2, 4 and 8 for 32 x 32 latents and 1,000 classes."""
    width, depth, heads = SIZES[preset]
    node = conf_node("backbone", f"dit_{preset}_2")
    assert (node["width"], node["depth"], node["heads"]) == SIZES[preset]
    config = {"hidden_size": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    full = config | {"input_size": 32, "in_channels": 4, "num_classes": 1000, "class_dropout_prob": 0.1}
    official = official_shapes("dit", full)
    for program, options in (("dit", dit.options(config)), ("sit", sit.options(config))):
        parts = dit.parts_of(*dit.nodes(config, options))
        ours = {name: list(tensor.shape) for part in parts.values() for name, tensor in part.expected.items()}
        assert ours == {name: shape for name, shape in official.items() if name != "pos_embed"}, program
