"""Conditioners of the official files (keys after `cond_stage_model.`) and ours, both ways.

Official classes are those of `ldm/modules/encoders/modules.py` in CompVis/latent-diffusion, CompVis/stable-diffusion
and Stability-AI/stablediffusion; Hugging Face's CLIPTextModel is read and written by `clip_names` too.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.layout import LayoutTokens
from ldmlab.conditioners.semantic import SpatialRescaler
from ldmlab.conditioners.text import OpenClipText
from ldmlab.conditioners.transformer_text import TransformerText
from ldmlab.errors import InputError
from ldmlab.interop.clip_names import from_hugging_face, to_hugging_face

Params = Mapping[str, Any]
Node = dict[str, Any]
State = Mapping[str, Tensor]

_HOME = "ldmlab.conditioners."
_CLIP: dict[str, dict[str, Any]] = {  # official `version` or `arch` => open_clip's text configuration
    "openai/clip-vit-large-patch14": {"embed_dim": 768, "text_cfg": {"width": 768, "heads": 12, "layers": 12}},
    "ViT-H-14": {"embed_dim": 1024, "text_cfg": {"width": 1024, "heads": 16, "layers": 24}},
}
_BLOCK = {  # of the paper's transformer: two official entries a block
    "norm_attention": "{even}.0",
    "attention.q": "{even}.1.to_q",
    "attention.k": "{even}.1.to_k",
    "attention.v": "{even}.1.to_v",
    "attention.out": "{even}.1.to_out",
    "norm_mlp": "{odd}.0",
    "expand": "{odd}.1.net.0.0",
    "shrink": "{odd}.1.net.2",
}
_ENDS = {"tokens": "token_emb", "positions": "pos_emb.emb", "norm": "norm", "unused_head": "to_logits"}


def arguments(target: str, params: Params) -> Node:
    """An official `target` and `params` as the node of our conditioner (`_target_` and arguments)."""
    name = target.rpartition(".")[2]
    known: dict[str, Callable[[Params], Node]] = {
        "ClassEmbedder": _class_embedder,
        "TransformerEmbedder": _transformer,
        "BERTEmbedder": _transformer,
        "SpatialRescaler": _rescaler,
        "FrozenCLIPEmbedder": _clip,
        "FrozenOpenCLIPEmbedder": _open_clip,
    }
    if name not in known:
        raise InputError(f"conditioner target={target} is not known; known are {', '.join(known)}.")
    return known[name](params)


def _class_embedder(params: Params) -> Node:
    """The 1001st row of ImageNet's table, and the last of one trained with `ucg_rate`, means "no class"."""
    rows, rate = params.get("n_classes", 1000), params.get("ucg_rate", 0.0)
    null_row = rows == 1001 or rate > 0
    node = {"_target_": _HOME + "class_label.ClassEmbedder", "classes": rows - null_row, "width": params["embed_dim"]}
    return node | {"drop": rate, "null_row": null_row}


def _transformer(params: Params) -> Node:
    """Captions, or boxes where no tokenizer is used and the length is that of triples and two crop corners."""
    shared = {"width": params["n_embed"], "depth": params["n_layer"], "drop": 0.0, "unused_head": True}
    size, length = params.get("vocab_size", 30522), params.get("max_seq_len", 77)
    objects, rest = divmod(length, 3)
    if params.get("use_tokenizer", True) or rest == 1:
        kind = {"_target_": _HOME + "transformer_text.TransformerText", "length": length}
    else:
        kind = {"_target_": _HOME + "layout.LayoutTokens", "objects": objects, "crop_tokens": rest == 2}
    return kind | shared | {"vocab_size": size}


def _rescaler(params: Params) -> Node:
    return {
        "_target_": _HOME + "semantic.SpatialRescaler",
        "classes": params.get("in_channels", 3),
        "channels": params.get("out_channels"),
        "stages": params.get("n_stages", 1),
        "multiplier": params.get("multiplier", 0.5),
        "method": params.get("method", "bilinear"),
        "bias": params.get("bias", False),
    }


def _clip(params: Params) -> Node:
    """SD 1.x: last layer, padded with the end token, quick GELU."""
    layers = {"last": "last", "pooled": "pooled"}
    return _text(params.get("version", "openai/clip-vit-large-patch14"), params, layers, "end", quick_gelu=True)


def _open_clip(params: Params) -> Node:
    """SD 2.x: penultimate layer, padded with zeros; the block and the projection that are not run are carried."""
    layers = {"last": "last", "penultimate": "penultimate"}
    return _text(params.get("arch", "ViT-H-14"), params, layers, "zero", quick_gelu=False) | {"unused": True}


def _text(version: str, params: Params, layers: Mapping[str, str], padding: str, *, quick_gelu: bool) -> Node:
    layer = params.get("layer", "last")
    if version not in _CLIP or layer not in layers:
        raise InputError(
            f"conditioner version={version}, layer={layer} is not known; known are {', '.join(_CLIP)} "
            f"and {', '.join(layers)}."
        )
    config = _CLIP[version] | {"quick_gelu": quick_gelu}
    config["text_cfg"] = {"context_length": params.get("max_length", 77), "vocab_size": 49408} | config["text_cfg"]
    node = {"_target_": _HOME + "text.open_clip_text", "config": config, "layer": layers[layer], "padding": padding}
    return node | {"drop": 0.0}


def to_ours(conditioner: nn.Module, official: State) -> dict[str, Tensor]:
    """Official tensors (no prefix) under our names; what our module has no place for keeps its official name."""
    if isinstance(conditioner, OpenClipText):
        return _clip_to_ours(conditioner, official)
    names = {theirs: ours for ours, theirs in names_of(conditioner).items()}
    return {names.get(key, key): tensor for key, tensor in official.items()}


def to_official(conditioner: nn.Module, state: State | None = None) -> dict[str, Tensor]:
    """Our tensors (of `state` or the module's own) under their official names (no prefix)."""
    state = conditioner.state_dict() if state is None else state
    if isinstance(conditioner, OpenClipText):
        return _clip_to_official(conditioner, state)
    names = names_of(conditioner)
    return {names[key]: tensor for key, tensor in state.items()}


def names_of(conditioner: nn.Module) -> dict[str, str]:
    """Our name => official name of every tensor, for conditioners whose tensors correspond one to one."""
    if isinstance(conditioner, ClassEmbedder):
        return {"embedding.weight": "embedding.weight"}
    if isinstance(conditioner, SpatialRescaler):
        return {key: f"channel_mapper.{key.partition('.')[2]}" for key in conditioner.state_dict()}
    if isinstance(conditioner, (TransformerText, LayoutTokens)):
        return {key: _transformer_name(key) for key in conditioner.state_dict()}
    raise InputError(
        f"conditioner {type(conditioner).__name__} has no official counterpart with weights; "
        "export with --format ldmlab."
    )


def _transformer_name(ours: str) -> str:
    """transformer.blocks.3.expand.weight => transformer.attn_layers.layers.7.1.net.0.0.weight"""
    module, _, leaf = ours.removeprefix("transformer.").rpartition(".")
    if module in _ENDS:
        return f"transformer.{_ENDS[module]}.{leaf}"
    _, number, part = module.split(".", 2)
    place = _BLOCK[part].format(even=2 * int(number), odd=2 * int(number) + 1)
    return f"transformer.attn_layers.layers.{place}.{leaf}"


def _clip_to_ours(conditioner: OpenClipText, official: State) -> dict[str, Tensor]:
    """Hugging Face names (SD 1.x) or open_clip names (SD 2.x) under the tower's."""
    if not any(key.startswith("model.") for key in official):
        return {f"tower.{key}": tensor for key, tensor in from_hugging_face(official).items()}
    blocks = len(conditioner.tower.transformer.resblocks)
    idle = f"transformer.resblocks.{blocks}."
    result = {}
    for key, tensor in official.items():
        name = key.removeprefix("model.")
        if name.startswith(idle):
            name = f"unused.blocks.0.{name.removeprefix(idle)}"
        elif name in ("text_projection", "logit_scale"):
            name = f"unused.{name}"
        if name != "attn_mask":  # old files carry the causal mask
            result[f"tower.{name}"] = tensor
    return result


def _clip_to_official(conditioner: OpenClipText, state: State) -> dict[str, Tensor]:
    tower = {key.removeprefix("tower."): tensor for key, tensor in state.items()}
    if conditioner.tower.unused is None:
        prefix = "transformer.text_model."
        return {prefix + key: tensor for key, tensor in to_hugging_face(tower).items()}
    blocks = len(conditioner.tower.transformer.resblocks)
    result = {}
    for key, tensor in tower.items():
        name = key.replace("unused.blocks.0.", f"transformer.resblocks.{blocks}.").removeprefix("unused.")
        result[f"model.{name}"] = tensor
    return result


def load_official(conditioner: nn.Module, official: State) -> None:
    """Copy official weights (no prefix) into a conditioner of ours; every tensor must match."""
    ours, wanted = to_ours(conditioner, official), conditioner.state_dict()
    missing, extra = wanted.keys() - ours.keys(), ours.keys() - wanted.keys()
    misshapen = [key for key in wanted.keys() & ours.keys() if wanted[key].shape != ours[key].shape]
    if missing or extra or misshapen:
        raise InputError(
            f"the official weights do not fit the conditioner: {len(missing)} missing {sorted(missing)[:3]}, "
            f"{len(extra)} unknown {sorted(extra)[:3]}, {len(misshapen)} of another shape {sorted(misshapen)[:3]}; "
            "check the configuration that came with the file."
        )
    with torch.no_grad():
        conditioner.load_state_dict(ours)
