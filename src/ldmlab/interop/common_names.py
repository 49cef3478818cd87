"""Tensor names that foreign formats have in common: spatial transformers, first stages, CLIP's text tower.

Hugging Face stores query, key and value separately, open_clip stacks them in this order in one matrix.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError

Pairs = Iterator[tuple[str, str]]  # (their module, our module)

_TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
_TRANSFORMER_BLOCK = {
    "norm1": "norm_self",
    "norm2": "norm_cross",
    "norm3": "norm_mlp",
    "ff.net.0.proj": "mlp.expand",
    "ff.net.2": "mlp.out",
    **{
        f"{foreign}.{product}": f"{ours}.{name}"
        for foreign, ours in (("attn1", "self_attention"), ("attn2", "cross_attention"))
        for product, name in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out"))
    },
}


def under(foreign: str, ours: str, names: Mapping[str, str]) -> Pairs:
    """The names (foreign => ours) of what is inside a module."""
    return ((f"{foreign}.{name}", f"{ours}.{own}") for name, own in names.items())


def spatial_transformer(foreign: str, ours: str, depth: int) -> Pairs:
    """Attention over pixels and to tokens, at one place of a U-Net."""
    yield from under(foreign, ours, _TRANSFORMER)
    for i in range(depth):
        yield from under(f"{foreign}.transformer_blocks.{i}", f"{ours}.blocks.{i}", _TRANSFORMER_BLOCK)


def refuse_cosine(node: Mapping[str, Any]) -> None:
    """Codes of unit length exist only in ldmlab: other programs would decode with other vectors."""
    if node.get("cosine"):
        raise InputError("first_stage.cosine=true exists only in ldmlab; export it with --format ldmlab.")


def only_ours(name: str) -> bool:
    """Counters of codebook options that no official first stage has."""
    return name.startswith("quantiser.") and name != "quantiser.codebook.weight"


State = Mapping[str, Tensor]

_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_BLOCK = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_PARTS = ("q_proj", "k_proj", "v_proj")
_PREFIXES = ("transformer.", "text_model.")  # inside SD 1.x files, and of older releases
_IGNORED = "embeddings.position_ids"  # a counter that older releases stored


def clip_node(config: Mapping[str, Any], *, layer: str = "last", padding: str = "end") -> dict[str, Any]:
    """Our conditioner's node for a CLIPTextModel's `config.json`; padding: zero where its pad token is number 0."""
    activations = {"quick_gelu": True, "gelu": False}
    if config.get("hidden_act", "quick_gelu") not in activations:
        raise InputError(
            f"text encoder hidden_act={config['hidden_act']} is not supported; supported: quick_gelu and gelu."
        )
    width = config["hidden_size"]
    text = {
        "context_length": config["max_position_embeddings"],
        "vocab_size": config["vocab_size"],
        "width": width,
        "heads": config["num_attention_heads"],
        "layers": config["num_hidden_layers"],
        "mlp_ratio": config["intermediate_size"] / width,
    }
    tower = {
        "embed_dim": config.get("projection_dim", width),
        "quick_gelu": activations[config.get("hidden_act", "quick_gelu")],
        "text_cfg": text,
    }
    return {
        "_target_": "ldmlab.conditioners.text.open_clip_text",
        "config": tower,
        "layer": layer,
        "padding": padding,
        "drop": 0.0,
    }


def from_hugging_face(official: State) -> dict[str, Tensor]:
    """CLIPTextModel's tensors under open_clip's names; unknown ones keep foreign."""
    result: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    for key, tensor in official.items():
        name = key
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name == _IGNORED:
            continue
        matched = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if matched is None:
            result[_ENDS.get(name, key)] = tensor
            continue
        block, module, leaf = f"transformer.resblocks.{matched[1]}", matched[2], matched[3]
        part = module.removeprefix("self_attn.")
        if part in _PARTS:
            fused.setdefault(f"{block}.attn.in_proj_{leaf}", {})[part] = tensor
        else:
            result[f"{block}.{_BLOCK[module]}.{leaf}" if module in _BLOCK else key] = tensor
    for name, parts in fused.items():
        if len(parts) == len(_PARTS):  # else it is missing, which loading reports
            result[name] = torch.cat([parts[part] for part in _PARTS])
    return result


def to_hugging_face(tower: State) -> dict[str, Tensor]:
    """The inverse of `from_hugging_face`, without a prefix; weights that are not run are left out."""
    ends = {ours: foreign for foreign, ours in _ENDS.items()}
    blocks = {ours: foreign for foreign, ours in _BLOCK.items()}
    result = {}
    for key, tensor in tower.items():
        if key.startswith("unused."):
            continue
        if key in ends:
            result[ends[key]] = tensor
            continue
        _, _, number, rest = key.split(".", 3)
        layer = f"encoder.layers.{number}"
        if rest.startswith("attn.in_proj_"):
            leaf = rest.removeprefix("attn.in_proj_")
            for part, piece in zip(_PARTS, tensor.chunk(3), strict=True):
                result[f"{layer}.self_attn.{part}.{leaf}"] = piece.contiguous()
        else:
            module, _, leaf = rest.rpartition(".")
            result[f"{layer}.{blocks[module]}.{leaf}"] = tensor
    return result
