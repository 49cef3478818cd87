"""Conditioners give the official programs' outputs and have the released models' tensors."""

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from drawn_weights import TOLERANCE, drawn
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.interop import compvis, diffusers, renaming
from ldmlab.interop.compvis import compvis_conditioners, compvis_networks
from ldmlab.interop.renaming import Part

ASSETS = Path(__file__).parents[1] / "assets/reference"
CASES = json.loads((ASSETS / "compvis/conditioners.json").read_text())
LAYOUTS = json.loads((ASSETS / "compvis/conditioner_layouts.json").read_text())
CLIP = json.loads((ASSETS / "clip/index.json").read_text())
CLIP_IO = load_file(ASSETS / "clip/hf_text_model.safetensors")
PREFIX = "cond_stage_model."
TARGET = "ldm.modules.encoders.modules."
TARGETS = {
    "text_transformer": TARGET + "TransformerEmbedder",
    "class_embedder": TARGET + "ClassEmbedder",
    "spatial_rescaler": TARGET + "SpatialRescaler",
}


def build(target: str, params: dict[str, Any], official: dict[str, Tensor]) -> nn.Module:
    return compvis.build_conditioner(target, params, official)


def output(name: str, conditioner: Any, io: dict[str, Tensor]) -> Tensor:
    if name == "text_transformer":
        return conditioner.transformer(io["tokens"])
    if name == "class_embedder":
        return conditioner({"class_id": io["y"]}, None)
    return conditioner.rescale(io["x"])


def official_tensors(conditioner: Any) -> dict[str, Tensor]:
    """The conditioner's tensors under their official names."""
    names = compvis_networks.conditioner_names(conditioner)
    return Part("conditioner", conditioner, names).to_foreign(conditioner.state_dict())


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_round_trip(name: str) -> None:
    case, io = CASES[name], load_file(ASSETS / f"compvis/{name}.safetensors")
    official = drawn(case, PREFIX)
    first = build(TARGETS[name], case["config"], official)
    exported, config = official_tensors(first), compvis_conditioners.official_config(first)
    assert_equal(exported, official)
    assert sum(p.numel() for p in first.parameters()) == case["params"]
    for conditioner in (first, build(config["target"], config["params"], exported)):
        given = output(name, conditioner, io)
        torch.testing.assert_close(given, io["out"], atol=TOLERANCE, rtol=0)
        given.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in conditioner.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layouts(name: str) -> None:
    layout = LAYOUTS[name]
    node = compvis_conditioners.arguments(layout["config"]["target"], layout["config"]["params"])
    with torch.device("meta"):
        conditioner = instantiate(node, where="conditioner")
    official = official_tensors(conditioner)
    text = "\n".join(f"{key} {list(tensor.shape)}" for key, tensor in sorted(official.items()))
    assert len(official) == layout["tensors"]
    assert hashlib.sha256(text.encode()).hexdigest() == layout["sha256"]
    assert sum(p.numel() for p in conditioner.parameters()) == layout["params"]
    again = compvis_conditioners.official_config(conditioner)
    assert compvis_conditioners.arguments(again["target"], again["params"]) == node


def test_only_the_table_of_1001_means_no_class() -> None:
    def node(**params: Any) -> dict[str, Any]:
        return compvis_conditioners.arguments(TARGET + "ClassEmbedder", {"embed_dim": 8, **params})

    assert (node()["classes"], node()["null_row"]) == (1000, False)
    assert (node(n_classes=1001)["classes"], node(n_classes=1001)["null_row"]) == (1000, True)
    assert (node(n_classes=11, ucg_rate=0.1)["classes"], node(n_classes=11)["classes"]) == (10, 11)
    without = instantiate(node(n_classes=11), where="conditioner")
    with pytest.raises(InputError, match="use guidance_scale=1"):
        without.null({"class_id": torch.zeros(2)}, None)


@pytest.mark.parametrize(
    ("layer", "expected"), [("last", "last_hidden_state"), ("penultimate", "penultimate_normed"), ("pooled", "pooled")]
)
def test_hugging_faces_text_encoder(layer: str, expected: str) -> None:
    official = drawn(CLIP)
    node = renaming.clip_node(CLIP["config"], layer=layer) | {"trainable": True, "unused": layer == "penultimate"}
    text = instantiate(node, where="conditioner")
    whole = instantiate(node | {"layer": "last", "unused": False}, where="conditioner")
    ours = Part("text", whole, renaming.clip_names(whole.state_dict(), "")).to_ours(official)
    if layer == "penultimate":  # the last block is there and idle; so is what Hugging Face does not have
        ours = {n.replace("tower.transformer.resblocks.2.", "tower.unused.blocks.0."): t for n, t in ours.items()}
        ours |= {n: t for n, t in text.state_dict().items() if n.endswith(("text_projection", "logit_scale"))}
    text.load_state_dict(ours)
    given = text.tower(CLIP_IO["tokens"])
    given = given[:, 0] if layer == "pooled" else given
    torch.testing.assert_close(given, CLIP_IO[expected], atol=TOLERANCE, rtol=0)
    given.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in text.parameters() if p.requires_grad)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_hugging_faces_names_there_and_back(prefix: str) -> None:
    official = drawn(CLIP)
    named = {prefix + key: tensor for key, tensor in official.items()}
    named[prefix + "embeddings.position_ids"] = torch.arange(9)[None]  # a counter of older releases
    text = diffusers.build_text(CLIP["config"], named)
    names = renaming.clip_names(text.state_dict(), "")
    assert_equal(Part("text", text, names).to_foreign(text.state_dict()), official)


def stable_diffusion_1() -> dict[str, Tensor]:
    return {f"transformer.text_model.{key}": tensor for key, tensor in drawn(CLIP).items()}


def test_stable_diffusion_1() -> None:
    """Quick GELU, the last layer, padded with the end token: a small tower is recognised by its tensors."""
    official, target = stable_diffusion_1(), TARGET + "FrozenCLIPEmbedder"
    text: Any = build(target, {}, official)
    assert_equal(official_tensors(text), official)
    assert not any(p.requires_grad for p in text.parameters())
    assert text.padding == "end"
    # the reference has four heads of 8 channels, which no tensor shows: CLIP's own have 64
    assert text.node["config"]["text_cfg"] == {
        "context_length": 9, "vocab_size": 101, "width": 32, "heads": 1, "layers": 3,
    }  # fmt: skip
    config = compvis_conditioners.official_config(text)
    assert config == {"target": target, "params": {"version": None, "layer": "last"}}
    assert compvis_conditioners.arguments(target, {}) == {
        "_target_": "ldmlab.conditioners.text.open_clip_text",
        "config": {
            "embed_dim": 768,
            "quick_gelu": True,
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
        },
        "layer": "last",
        "padding": "end",
        "drop": 0.0,
        "trainable": False,
    }


def stable_diffusion_2(layers: int) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    text = {"context_length": 12, "width": 128, "heads": 2, "layers": layers}
    vision = {"layers": 1, "width": 64, "head_width": 64, "patch_size": 32, "image_size": 32}
    clip = open_clip.CLIP(embed_dim=24, text_cfg=text, vision_cfg=vision).eval()
    official = {f"model.{k}": v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
    return clip, official


@torch.no_grad()
def test_stable_diffusion_2() -> None:
    clip, official = stable_diffusion_2(layers=3)
    old = official | {"model.attn_mask": torch.zeros(12, 12)}  # which older files carry
    text: Any = build(TARGET + "FrozenOpenCLIPEmbedder", {"freeze": True, "layer": "penultimate"}, old)
    assert_equal(official_tensors(text), official)
    seen: list[Tensor] = []
    hook = clip.transformer.resblocks[1].register_forward_hook(lambda module, given, out: seen.append(out))
    clip.encode_text(text.ids(["a red apple"]))
    hook.remove()
    states = text({"caption": ["a red apple"]}, None)
    torch.testing.assert_close(states, clip.ln_final(seen[0]), atol=TOLERANCE, rtol=0)
    config = compvis_conditioners.official_config(text)
    assert config["params"] == {"arch": None, "layer": "penultimate"}
    assert_equal(build(config["target"], config["params"], official).state_dict(), text.state_dict())


def test_published_text_towers_are_named() -> None:
    for name, params in (
        ("FrozenCLIPEmbedder", {"version": "openai/clip-vit-large-patch14", "layer": "last"}),
        ("FrozenOpenCLIPEmbedder", {"arch": "ViT-H-14", "layer": "penultimate"}),
    ):
        with torch.device("meta"):
            text = instantiate(compvis_conditioners.arguments(TARGET + name, params), where="conditioner")
        assert compvis_conditioners.official_config(text) == {"target": TARGET + name, "params": params}
        blocks = {key for key in official_tensors(text) if "23." in key}
        assert len(blocks) == (12 if "Open" in name else 0)  # the block that is not run is carried


def test_a_tower_without_its_idle_block() -> None:
    """diffusers keeps 23 of 24 blocks; written as an official file and read again, all 23 run."""
    text = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 23}
    node = {"config": {"embed_dim": 1024, "text_cfg": text}, "layer": "last"}
    with torch.device("meta"):
        module = instantiate({"_target_": "ldmlab.conditioners.text.open_clip_text", **node}, where="conditioner")
    official, config = official_tensors(module), compvis_conditioners.official_config(module)
    assert config["params"] == {"arch": "ViT-H-14", "layer": "penultimate"}
    again = compvis_conditioners.arguments(config["target"], config["params"], official)
    assert (again["layer"], again["unused"], again["config"]["text_cfg"]) == ("last", False, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("transformer.norm.bias"), r"1 missing \(transformer.norm.bias\)"),
        (lambda w: w.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda w: w.update({"transformer.norm.bias": torch.zeros(3)}), r"1 misshapen"),
    ],
)
def test_weights_that_do_not_fit_are_listed(change: Any, message: str) -> None:
    case = CASES["text_transformer"]
    official = drawn(case, PREFIX)
    change(official)
    with pytest.raises(InputError, match=message):
        build(TARGETS["text_transformer"], case["config"], official)


def test_a_projection_that_misses_a_part_is_missing() -> None:
    official = stable_diffusion_1()
    del official["transformer.text_model.encoder.layers.1.self_attn.k_proj.weight"]
    message = r"1 missing \(transformer\.text_model\.encoder\.layers\.1\.self_attn\.k_proj\.weight\)"
    with pytest.raises(InputError, match=message):
        build(TARGET + "FrozenCLIPEmbedder", {}, official)


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("ldm.modules.encoders.modules.FrozenT5Embedder", {}, "FrozenT5Embedder is not supported"),
        (TARGET + "FrozenCLIPEmbedder", {"version": "someone/else"}, "version=someone/else is not supported"),
        (TARGET + "FrozenCLIPEmbedder", {"layer": "hidden"}, "layer=hidden is not supported"),
    ],
)
def test_unknown_classes(target: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compvis_conditioners.arguments(target, params)


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "ldmlab.conditioners.mask.Mask", "downsampling": 4},
        {"_target_": "ldmlab.conditioners.layout_tokens.LayoutTokens", "width": 8, "depth": 1, "heads": 2},
    ],
)
def test_what_has_no_official_class_is_refused(node: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="export with --format ldmlab"):
        compvis_conditioners.official_config(instantiate(node, where="conditioner"))
