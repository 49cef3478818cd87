"""Tensor names of diffusers' U-Nets and ours, both ways: a pure function of the architecture.

Our attention over pixels keeps q, k, v of every head in one product (rows: head, then q | k | v, then its width), and
our 1 x 1 projections are linear layers; diffusers has three products, and convolutions unless `use_linear_projection`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.interop.common_names import Pairs, spatial_transformer, under

_RES = {
    "norm1": "norm_in",
    "conv1": "conv_in",
    "time_emb_proj": "emb",
    "norm2": "norm_out",
    "conv2": "conv_out",
    "conv_shortcut": "skip",
}
_ENDS = {
    "time_embedding.linear_1": "time.expand",
    "time_embedding.linear_2": "time.mix",
    "conv_in": "conv_in",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
_PIXEL_ATTENTION = {"group_norm": "norm", "to_out.0": "out"}
_FUSED = ("to_q", "to_k", "to_v")  # => qkv
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def module_names(arguments: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' module name => ours; q, k, v of attention over pixels are not among them. Some may be absent."""
    levels, blocks = len(arguments["channel_mult"]), arguments["num_res_blocks"]
    names = dict(_ENDS)
    if arguments.get("vector_width") is not None and arguments.get("project_vector", True):
        names["class_embedding"] = "vector"

    def block(foreign: str, ours: str, number: int, *, attention: bool) -> Pairs:
        yield from under(f"{foreign}.resnets.{number}", f"{ours}.res", _RES)
        if attention:
            yield from _attention(f"{foreign}.attentions.{number}", f"{ours}.attention", arguments)

    for way, level_blocks in (("down", blocks), ("up", blocks + 1)):
        for i in range(levels):
            factor = 2 ** (i if way == "down" else levels - 1 - i)
            foreign, ours = f"{way}_blocks.{i}", f"{way}.{i}"
            for j in range(level_blocks):
                present = factor in arguments["attention_downsampling"]
                names |= block(foreign, f"{ours}.blocks.{j}", j, attention=present)
            resampler = f"{foreign}.{way}samplers.0", f"{ours}.resample"
            residual = arguments.get("residual_resampling")
            names |= under(*resampler, _RES if residual else {"conv": "conv"})
    names |= block("mid_block", "middle.0", 0, attention=True)
    names |= under("mid_block.resnets.1", "middle.1.res", _RES)
    return names


def _attention(foreign: str, ours: str, arguments: Mapping[str, Any]) -> Pairs:
    if arguments.get("context_width") is None:
        return under(foreign, ours, _PIXEL_ATTENTION)
    return spatial_transformer(foreign, ours, arguments.get("transformer_depth", 1))


def to_diffusers(
    state: Mapping[str, Tensor], arguments: Mapping[str, Any], *, linear_projection: bool
) -> dict[str, Tensor]:
    """Our tensors under diffusers' names."""
    foreign = {ours: name for name, ours in module_names(arguments).items()}
    result = {}
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        if module.endswith(".attention.qkv"):
            inside = foreign[module.replace(".qkv", ".out")].removesuffix(".to_out.0")
            heads = _heads(arguments, tensor.shape[0] // 3)
            for name, part in zip(_FUSED, tensor.unflatten(0, (heads, 3, -1)).unbind(1), strict=True):
                result[f"{inside}.{name}.{leaf}"] = part.flatten(0, 1)
            continue
        if leaf == "weight" and module.endswith((".proj_in", ".proj_out")) and not linear_projection:
            tensor = tensor[:, :, None, None]
        result[f"{foreign[module]}.{leaf}"] = tensor
    return result


def to_ours(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' tensors under our names; the keys must be those that `to_diffusers` gives for the architecture."""
    names = module_names(arguments)
    result, products = {}, dict[tuple[str, str], dict[str, Tensor]]()
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        if module in names:
            ours = names[module]
            linear = ".attention." in ours and tensor.ndim > 2
            result[f"{ours}.{leaf}"] = tensor.flatten(1) if linear else tensor
        else:
            inside, product = module.rsplit(".", 1)
            ours = names[f"{inside}.to_out.0"].replace(".out", ".qkv")
            products.setdefault((ours, leaf), {})[product] = tensor
    for (ours, leaf), parts in products.items():
        whole = [parts[name].flatten(1) if leaf == "weight" else parts[name] for name in _FUSED]
        heads = _heads(arguments, len(whole[0]))
        result[f"{ours}.{leaf}"] = torch.stack([part.unflatten(0, (heads, -1)) for part in whole], dim=1).flatten(0, 2)
    return result


def cosines_first(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a network with `flip_sin_to_cos=false` for a time embedding whose cosines come first."""
    key = "time_embedding.linear_1.weight"
    if key not in state:
        return dict(state)
    sines, cosines = state[key].chunk(2, dim=1)
    return {**state, key: torch.cat([cosines, sines], dim=1)}


def modern_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of files written before diffusers 0.15, whose attention over pixels had other names."""
    result = {}
    for key, tensor in state.items():
        *parents, module, leaf = key.split(".") if key.count(".") > 1 else ("", "", key)
        if "attentions" in parents and module in _OLD_NAMES:
            key = ".".join([*parents, _OLD_NAMES[module], leaf])
        result[key] = tensor
    return result


def _heads(arguments: Mapping[str, Any], width: int) -> int:
    """Number of heads at a place of this width."""
    return int(arguments.get("heads") or 0) or width // int(arguments["head_channels"])
