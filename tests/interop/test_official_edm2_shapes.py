"""EDM2's official form takes any legal configuration, and presets have the official sizes, by the shapes below."""

import json
import math
import random
from typing import Any

import pytest
import torch

from conf_files import conf_node
from drawn_weights import weight_by_rule
from ldmlab.backbones.edm2_unet import EDM2UNet
from ldmlab.checkpoints import without_weights
from ldmlab.interop import edm2
from modern_cases import ASSETS

EDM2: dict[str, dict[str, Any]] = json.loads((ASSETS / "edm2.json").read_text())
Shapes = dict[str, list[int]]


def edm2_shapes(config: dict[str, Any]) -> Shapes:
    """The state dict of the official `Precond`."""
    of = {"model_channels": 192, "channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [16, 8]} | config
    widths = [of["model_channels"] * mult for mult in of["channel_mult"]]
    noise = of["model_channels"] * of["channel_mult_noise"] if of.get("channel_mult_noise") else widths[0]
    embedding = of["model_channels"] * of["channel_mult_emb"] if of.get("channel_mult_emb") else max(widths)
    shapes: Shapes = {}

    def block(name: str, columns: int, rows: int, attends: bool) -> None:
        first = rows if name.startswith("enc") else columns
        tensors = {"emb_gain": [], "conv_res0.weight": [rows, first, 3, 3], "emb_linear.weight": [rows, embedding]}
        tensors |= {"conv_res1.weight": [rows, rows, 3, 3]}
        if rows != columns:
            tensors["conv_skip.weight"] = [rows, columns, 1, 1]
        if attends and rows >= of.get("channels_per_head", 64):
            tensors |= {"attn_qkv.weight": [3 * rows, rows, 1, 1], "attn_proj.weight": [rows, rows, 1, 1]}
        shapes.update({f"unet.{name}.{leaf}": shape for leaf, shape in tensors.items()})

    skips, width = [], of["img_channels"] + 1
    for level, rows in enumerate(widths):
        side = of["img_resolution"] >> level
        if level == 0:
            shapes[f"unet.enc.{side}x{side}_conv.weight"] = [rows, width, 3, 3]
            width = rows
        else:
            block(f"enc.{side}x{side}_down", width, width, False)
        skips.append(width)
        for i in range(of["num_blocks"]):
            block(f"enc.{side}x{side}_block{i}", width, rows, side in of["attn_resolutions"])
            width = rows
            skips.append(width)
    for level, rows in reversed(list(enumerate(widths))):
        side = of["img_resolution"] >> level
        if level == len(widths) - 1:
            block(f"dec.{side}x{side}_in0", width, width, True)
            block(f"dec.{side}x{side}_in1", width, width, False)
        else:
            block(f"dec.{side}x{side}_up", width, width, False)
        for i in range(of["num_blocks"] + 1):
            block(f"dec.{side}x{side}_block{i}", width + skips.pop(), rows, side in of["attn_resolutions"])
            width = rows
    logvar = of.get("logvar_channels", 128)
    shapes |= {f"unet.emb_fourier.{leaf}": [noise] for leaf in ("freqs", "phases")}
    shapes |= {f"logvar_fourier.{leaf}": [logvar] for leaf in ("freqs", "phases")}
    shapes |= {"unet.emb_noise.weight": [embedding, noise], "logvar_linear.weight": [1, logvar], "unet.out_gain": []}
    if of.get("label_dim"):
        shapes["unet.emb_label.weight"] = [embedding, of["label_dim"]]
    return shapes | {"unet.out_conv.weight": [of["img_channels"], width, 3, 3]}


@pytest.mark.parametrize("name", [name for name in EDM2 if "keys" in EDM2[name]])
def test_shapes_of_edm2_follow_from_the_configuration(name: str) -> None:
    assert edm2_shapes(EDM2[name]["config"]) == EDM2[name]["keys"]


EDM2_WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


@pytest.mark.parametrize("preset", EDM2_WIDTHS)
def test_presets_of_edm2_have_the_official_sizes(preset: str) -> None:
    """For 64 x 64 latents and 1,000 classes, without log-variance and Fourier features, which are not learned."""
    config = {"img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": EDM2_WIDTHS[preset]}
    node = {name: value for name, value in conf_node("backbone", f"edm2_{preset}").items() if name != "_target_"}
    with without_weights():
        network = EDM2UNet(**node | {"in_channels": 4, "out_channels": 4, "vector_width": 1000})
    official = {n: s for n, s in edm2_shapes(config).items() if n.startswith("unet.") and "fourier" not in n}
    assert sum(p.numel() for p in network.parameters()) == sum(math.prod(shape) for shape in official.values())


@pytest.mark.parametrize("seed", range(16))
@torch.no_grad()
def test_any_legal_configuration_of_edm2(seed: int) -> None:
    choose = random.Random(seed)
    levels, head = choose.randint(1, 3), choose.choice([4, 8, 16, 64])
    side = choose.choice([8, 12])
    config = {
        **{"img_resolution": side, "img_channels": choose.choice([1, 4]), "label_dim": choose.choice([0, 5])},
        **{"model_channels": 8, "channel_mult": [choose.randint(1, 3) for _ in range(levels)]},
        **{"num_blocks": choose.randint(1, 2), "attn_resolutions": choose.choice([[], [side], [side // 2, side // 4]])},
        **{
            "channels_per_head": head,
            "logvar_channels": choose.choice([8, 16]),
            "use_fp16": choose.choice([True, False]),
        },
        **{"channel_mult_noise": choose.choice([None, 2]), "channel_mult_emb": choose.choice([None, 3])},
        **{"dropout": 0.1, "sigma_data": choose.choice([0.5, 1.0]), "label_balance": 0.4, "clip_act": 256},
    }
    state = {name: weight_by_rule(name, shape, seed).reshape(shape) for name, shape in edm2_shapes(config).items()}
    model = edm2.as_official(config, state)
    given_back = model.official_state()
    assert given_back.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in given_back.items())
    x, labels = torch.randn(2, config["img_channels"], side, side), torch.eye(5)[:2] if config["label_dim"] else None
    out, log_variance = model(x, torch.tensor([0.3, 7.0]), labels, force_fp32=True, return_logvar=True)
    assert (out.shape, log_variance.shape) == (x.shape, (2, 1, 1, 1))
    assert out.isfinite().all()


def test_the_lowest_level_without_blocks_is_as_narrow_as_the_first() -> None:
    """And has no attention where that is narrower than a head."""
    config = {"img_resolution": 8, "img_channels": 1, "label_dim": 0, "model_channels": 8, "channel_mult": [1, 2]}
    config |= {"num_blocks": 0, "attn_resolutions": [], "channels_per_head": 16, "logvar_channels": 8}
    state = {name: weight_by_rule(name, shape, 0).reshape(shape) for name, shape in edm2_shapes(config).items()}
    assert edm2.as_official(config, state).official_state().keys() == state.keys()
