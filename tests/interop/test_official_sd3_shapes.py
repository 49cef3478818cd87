"""MMDiT's presets have every tensor of Stable Diffusion 3 and 3.5, by the shapes below; recorded ones check them."""

import math
from typing import Any

import pytest

from conf_files import conf_node
from ldmlab.interop.diffusers.diffusers_transformers import SD3, network_part
from modern_cases import networks

CASES = {name: case for name, case in networks("diffusers").items() if "joint_attention_dim" in case.get("config", {})}
Shapes = dict[str, list[int]]


def linear(name: str, rows: int, columns: int) -> Shapes:
    return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}


def sd3_shapes(of: dict[str, Any]) -> Shapes:
    """The state dict of `SD3Transformer2DModel`, without its table of positions."""
    width, patch = of["num_attention_heads"] * of["attention_head_dim"], of["patch_size"]
    shapes = {"pos_embed.proj.weight": [width, of["in_channels"], patch, patch], "pos_embed.proj.bias": [width]}
    for name, columns in (("timestep", 256), ("text", of["pooled_projection_dim"])):
        shapes |= linear(f"time_text_embed.{name}_embedder.linear_1", width, columns)
        shapes |= linear(f"time_text_embed.{name}_embedder.linear_2", width, width)
    shapes |= linear("context_embedder", width, of["joint_attention_dim"])
    for i in range(of["num_layers"]):
        at, last, twice = (
            f"transformer_blocks.{i}.",
            i == of["num_layers"] - 1,
            i in of.get("dual_attention_layers", ()),
        )
        shapes |= linear(f"{at}norm1.linear", (9 if twice else 6) * width, width)
        shapes |= linear(f"{at}norm1_context.linear", (2 if last else 6) * width, width)
        places = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
        added = [f"attn.add_{part}_proj" for part in "qkv"] + ([] if last else ["attn.to_add_out"])
        second = [place.replace("attn", "attn2") for place in places] if twice else []
        for place in places + added + second:
            shapes |= linear(at + place, width, width)
        if of.get("qk_norm"):
            normed = ["attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"]
            normed += ["attn2.norm_q", "attn2.norm_k"] if twice else []
            shapes |= {f"{at}{place}.weight": [of["attention_head_dim"]] for place in normed}
        for name in ("ff",) if last else ("ff", "ff_context"):
            shapes |= linear(f"{at}{name}.net.0.proj", 4 * width, width) | linear(f"{at}{name}.net.2", width, 4 * width)
    shapes |= linear("norm_out.linear", 2 * width, width)
    return shapes | linear("proj_out", patch**2 * of["out_channels"], width)


@pytest.mark.parametrize("name", CASES)
def test_shapes_follow_from_the_configuration(name: str) -> None:
    case = CASES[name]
    assert sd3_shapes(case["config"]) == {n: s for n, s in case["keys"].items() if n != "pos_embed.pos_embed"}


PRESETS: dict[str, tuple[int, dict[str, Any]]] = {  # layers and heads of 64 channels; what else differs
    "sd3_medium": (24, {}),
    "sd35_medium": (24, {"qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}),
    "sd35_large": (38, {"qk_norm": "rms_norm"}),
}
BILLIONS = {"sd3_medium": 2.03, "sd35_medium": 2.24, "sd35_large": 8.06}  # as published, rounded


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_official_sizes(preset: str) -> None:
    size, more = PRESETS[preset]
    config = {"num_layers": size, "num_attention_heads": size, "attention_head_dim": 64, "patch_size": 2, **more}
    config |= {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    node = conf_node("backbone", f"mmdit_{preset}")
    derived = {"in_channels": 16, "out_channels": 16, "context_width": 4096, "vector_width": 2048}
    ours = {name: list(tensor.shape) for name, tensor in network_part(node | derived, SD3).expected.items()}
    assert ours == sd3_shapes(config)
    assert sum(math.prod(shape) for shape in ours.values()) / 1e9 == pytest.approx(BILLIONS[preset], abs=0.005)
