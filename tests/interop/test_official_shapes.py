"""`as_official` of the transformers takes any legal configuration, and presets have the official sizes.

Names and shapes of official tensors follow from the configuration by `official_shapes`, which the recorded state dicts
check.
"""

import json
import random
from typing import Any

import pytest
import torch

from conf_files import conf_node
from drawn_weights import weight_by_rule
from ldmlab.interop import class_models, dit, lightningdit, repa, sit
from modern_cases import ASSETS

TRANSFORMERS: dict[str, dict[str, Any]] = json.loads((ASSETS / "transformers.json").read_text())
PROGRAMS: dict[str, Any] = {"dit": dit, "sit": sit, "lightningdit": lightningdit, "repa": repa}
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


def test_lightningdit_xl_has_the_official_size() -> None:
    node = {name: value for name, value in conf_node("backbone", "lightningdit_xl_1").items() if name != "_target_"}
    config = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 1, "in_channels": 32}
    config |= dict.fromkeys(("use_swiglu", "use_rope", "use_rmsnorm"), True)
    full = config | {"input_size": 16, "num_classes": 1000, "class_dropout_prob": 0.1}
    backbone, labels = dit.nodes(config, lightningdit.options(config))
    assert {name: value for name, value in backbone.items() if name in node} == {
        n: node[n] for n in backbone if n in node
    }
    ours = {n: list(t.shape) for part in dit.parts_of(backbone, labels).values() for n, t in part.expected.items()}
    constants = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
    assert ours == {n: s for n, s in official_shapes("lightningdit", full).items() if n not in constants}
