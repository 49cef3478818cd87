"""Tensor names of Hugging Face's CLIPTextModel and of open_clip's text tower, both ways.

Hugging Face keeps query, key and value apart, open_clip stacks them in this order in one matrix.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError

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


def node(config: Mapping[str, Any], *, layer: str = "last", padding: str = "end") -> dict[str, Any]:
    """Our conditioner's node for a CLIPTextModel's `config.json`; padding: zero where its pad token is number 0."""
    activations = {"quick_gelu": True, "gelu": False}
    if config.get("hidden_act", "quick_gelu") not in activations:
        raise InputError(f"text encoder hidden_act={config['hidden_act']} is not known; known are quick_gelu and gelu.")
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
    """CLIPTextModel's tensors under open_clip's names; unknown ones keep theirs."""
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
        if len(parts) == len(_PARTS):  # else it is missing, which loading tells
            result[name] = torch.cat([parts[part] for part in _PARTS])
    return result


def to_hugging_face(tower: State) -> dict[str, Tensor]:
    """The inverse of `from_hugging_face`, without a prefix; weights that are not run are left out."""
    ends = {ours: theirs for theirs, ours in _ENDS.items()}
    blocks = {ours: theirs for theirs, ours in _BLOCK.items()}
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
