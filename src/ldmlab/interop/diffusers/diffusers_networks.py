"""Names of the tensors of diffusers' and transformers' modules, and ours: pure functions of the architecture.

Our attention over pixels keeps q, k, v of every head in one product, and our 1 x 1 projections are linear layers;
diffusers has three products, and convolutions unless `use_linear_projection`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.interop import renaming
from ldmlab.interop.diffusers.diffusers_texts import BERT, BERT_TARGET, CLIP
from ldmlab.interop.renaming import Node, Part, State, StateDict

CLASS_TABLE = "class_embedding.weight"  # with num_class_embeds: rows are the U-Net's vector conditioning
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.15


def unet_part(node: Node, title: str, *, linear_projection: bool) -> Part:
    """UNet2DConditionModel or UNet2DModel, from a backbone node of model.yaml."""
    module = renaming.unfilled(node, "backbone")
    attention = "unet_of_pixels" if node.get("context_width") is None else "unet_with_tokens"
    names = renaming.renamed(module.state_dict(), renaming.names_of("diffusers", "unet", attention))
    projections = () if linear_projection else (".proj_in.weight", ".proj_out.weight")
    axes = {name: 4 for name in names if name.endswith(projections)}
    heads = {name: module.get_submodule(name.rsplit(".", 2)[0]).heads for name in names if ".qkv." in name}
    return Part(title, module, names, axes, heads)


def first_stage_part(node: Node, title: str) -> Part:
    """A first stage, from its node; diffusers' attention has linear layers, ours convolutions."""
    module = renaming.unfilled(node, "first_stage")
    if title == "AutoencoderDC":  # tensors have its names
        products = (".to_q.weight", ".to_k.weight", ".to_v.weight", ".to_out.weight")
        same: renaming.Names = {name: (name,) for name in module.state_dict()}
        return Part(title, module, same, {name: 2 for name in same if name.endswith(products)})
    tensors, table = (
        filter(renaming.named_as_theirs, module.state_dict()),
        renaming.names_of("diffusers", "first_stage"),
    )
    names = renaming.renamed(tensors, table)
    linear = [name for name in names if ".attention" in name and name.endswith(".weight") and ".norm." not in name]
    return Part(title, module, names, dict.fromkeys(linear, 2))


def text_part(node: Node) -> Part:
    """LDMBertModel or CLIPTextModel (names without a prefix), from a text conditioner's node."""
    module = renaming.unfilled(node, "conditioner")
    if node["_target_"] == BERT_TARGET:
        names = renaming.renamed(module.state_dict(), renaming.names_of("diffusers", "text"))
        return Part(f"text encoder {BERT}", module, names)
    return Part(f"text encoder {CLIP}", module, renaming.clip_names(module.state_dict(), ""))


def text_tensors(state: State, length: int) -> StateDict:
    """A text encoder's without prefixes, a counter that older releases stored and unused positions after `length`."""
    plain = {key.removeprefix("transformer.").removeprefix("text_model."): tensor for key, tensor in state.items()}
    plain.pop("embeddings.position_ids", None)
    for positions in ("embeddings.position_embedding.weight", "model.embed_positions.weight"):
        if positions in plain:
            plain[positions] = plain[positions][:length]
    return plain


def unet_tensors(state: State, config: Mapping[str, Any]) -> StateDict:
    """A U-Net's, for a time embedding whose cosines come first and without the class table."""
    tensors, key = modern_names(state), "time_embedding.linear_1.weight"
    if not config.get("flip_sin_to_cos", True) and key in tensors:
        sines, cosines = tensors[key].chunk(2, dim=1)
        tensors[key] = torch.cat([cosines, sines], dim=1)
    if config.get("num_class_embeds") is not None:
        tensors.pop(CLASS_TABLE, None)
    return tensors


def first_stage_tensors(state: State, config: Mapping[str, Any]) -> StateDict:
    """An autoencoder's; with a convolution on one side of the latent alone, the other is the identity."""
    tensors, channels = modern_names(state), config.get("latent_channels", 4)
    used = {name: config.get(f"use_{name}", True) for name in ("quant_conv", "post_quant_conv")}
    for name, width in (("quant_conv", 2 * channels), ("post_quant_conv", channels)):
        if any(used.values()) and not used[name]:
            tensors |= {f"{name}.weight": torch.eye(width)[:, :, None, None], f"{name}.bias": torch.zeros(width)}
    return tensors


def modern_names(state: State) -> dict[str, Tensor]:
    """Tensors of files written before diffusers 0.15, whose attention over pixels had other names."""
    result = {}
    for key, tensor in state.items():
        *parents, module, leaf = key.split(".") if key.count(".") > 1 else ("", "", key)
        if "attentions" in parents and module in _OLD_NAMES:
            key = ".".join([*parents, _OLD_NAMES[module], leaf])
        result[key] = tensor
    return result
