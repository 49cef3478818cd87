"""The autoencoders of diffusers (AutoencoderKL, VQModel) and our first stages: options and tensor names, both ways."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.common_names import only_ours, refuse_cosine, under
from ldmlab.interop.diffusers.diffusers_config import levels_with_attention, multiples, named_class, resolved

KL, VQ = "AutoencoderKL", "VQModel"
Config = Mapping[str, Any]
_SHARED: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "mid_block_add_attention": True,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    KL: _SHARED | {"latent_channels": 4, "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True},
    VQ: _SHARED | {"latent_channels": 3, "num_vq_embeddings": 256, "vq_embed_dim": None},
}
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "in_channels": (3,),
    "out_channels": (3,),
    "act_fn": ("silu", "swish"),
    "norm_type": ("group",),
}
_BLOCK = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "shortcut"}
_ATTENTION = {"group_norm": "norm", "to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out"}
_ENDS = {"conv_in": "input", "conv_norm_out": "output_norm", "conv_out": "output"}


def kind_of(config: Config) -> str:
    """The class a configuration belongs to, also where the file does not name it."""
    if named := named_class(config, _DEFAULTS, "the first stage"):
        return named
    return VQ if "num_vq_embeddings" in config else KL


def arguments(config: Config) -> dict[str, Any]:
    """`_target_` and arguments of our first stage for a diffusers configuration."""
    kind = kind_of(config)
    options = resolved(config, kind, _DEFAULTS[kind], _REQUIRED)
    inner = options["latent_channels"]
    ours = {
        "channels": options["block_out_channels"][0],
        "channel_mult": multiples(kind, options["block_out_channels"]),
        "num_res_blocks": options["layers_per_block"],
        "attention_downsampling": _attention_factors(kind, options),
        "mid_attention": options["mid_block_add_attention"],
        "latent_channels": inner,
        "bottleneck_channels": inner,
        "norm_groups": options["norm_num_groups"],
    }
    if kind == KL:
        return {"_target_": "ldmlab.first_stages.kl.KLAutoencoder", **ours}
    ours |= {"latent_channels": options["vq_embed_dim"] or inner, "codebook_size": options["num_vq_embeddings"]}
    return {"_target_": "ldmlab.first_stages.vq.VQModel", **ours}


def _attention_factors(kind: str, options: Config) -> list[int]:
    """Levels with attention, by downsampling factor."""
    known = {f"{prefix}{way}coderBlock2D" for prefix in ("", "Attn") for way in ("DownEn", "UpDe")}
    present = levels_with_attention(kind, options, "Attn", known)
    return [2**level for level, attends in enumerate(present) if attends]


def configuration(node: Mapping[str, Any], *, image_size: int, scaling_factor: float) -> tuple[str, Config]:
    """diffusers' class and options for the node of a first stage of ours; InputError for what it cannot hold."""
    targets = {"ldmlab.first_stages.kl.KLAutoencoder": KL, "ldmlab.first_stages.vq.VQModel": VQ}
    kind = targets.get(node["_target_"])
    if kind is None:
        raise InputError(f"first_stage={node['_target_']} has no class in diffusers; use --format ldmlab.")
    refuse_cosine(node)
    width = node["latent_channels"]
    inner = node.get("bottleneck_channels") or width
    if kind == KL and inner != width:
        raise InputError(
            f"first_stage.bottleneck_channels={inner}: {KL} requires latent_channels={width}; use --format compvis."
        )
    mult = list(node["channel_mult"])
    attention = ["Attn" if 2**i in node.get("attention_downsampling", ()) else "" for i in range(len(mult))]
    config = {
        "block_out_channels": [node.get("channels", 128) * m for m in mult],
        "down_block_types": [f"{present}DownEncoderBlock2D" for present in attention],
        "up_block_types": [f"{present}UpDecoderBlock2D" for present in reversed(attention)],
        "layers_per_block": node.get("num_res_blocks", 2),
        "latent_channels": inner,
        "norm_num_groups": node.get("norm_groups", 32),
        "sample_size": image_size,
        "scaling_factor": scaling_factor,
        "mid_block_add_attention": node.get("mid_attention", True),
    }
    if kind == VQ:
        config |= {"num_vq_embeddings": node["codebook_size"], "vq_embed_dim": width}
    return kind, config


def module_names(node: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' module name => ours, for every module that holds tensors; some may be absent."""
    vq = node["_target_"].endswith("VQModel")
    names = {"quant_conv": "to_latent" if vq else "to_moments", "post_quant_conv": "from_latent"}
    if vq:
        names["quantize.embedding"] = "quantiser.codebook"
    for half, way, extra in (("encoder", "down", 0), ("decoder", "up", 1)):
        names |= under(half, half, _ENDS)
        names |= under(f"{half}.mid_block.resnets.0", f"{half}.middle.first", _BLOCK)
        names |= under(f"{half}.mid_block.attentions.0", f"{half}.middle.attention", _ATTENTION)
        names |= under(f"{half}.mid_block.resnets.1", f"{half}.middle.second", _BLOCK)
        for i in range(len(node["channel_mult"])):  # both count decoder levels as they run, coarsest first
            foreign, ours = f"{half}.{way}_blocks.{i}", f"{half}.levels.{i}"
            names[f"{foreign}.{way}samplers.0.conv"] = f"{ours}.resample.conv"
            for j in range(node.get("num_res_blocks", 2) + extra):
                names |= under(f"{foreign}.resnets.{j}", f"{ours}.blocks.{j}", _BLOCK)
                names |= under(f"{foreign}.attentions.{j}", f"{ours}.attentions.{j}", _ATTENTION)
    return names


def to_diffusers(state: Mapping[str, Tensor], node: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our tensors under diffusers' names; its attention has linear layers where we have 1 x 1 convolutions."""
    foreign = {ours: name for name, ours in module_names(node).items()}
    result = {}
    for key, tensor in state.items():
        if only_ours(key):
            continue
        module, leaf = key.rsplit(".", 1)
        name = foreign[module]
        result[f"{name}.{leaf}"] = tensor.flatten(1) if ".attentions." in name and tensor.ndim > 1 else tensor
    return result


def to_ours(state: Mapping[str, Tensor], node: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers' tensors under our names; the keys must be those that `to_diffusers` gives for the architecture."""
    names = module_names(node)
    result = {}
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        linear = ".attentions." in module and leaf == "weight" and "norm" not in module.rpartition(".")[2]
        result[f"{names[module]}.{leaf}"] = tensor.flatten(1)[:, :, None, None] if linear else tensor
    return result


def with_quant_convs(state: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """Autoencoders without the convolutions around the latent get identity ones."""
    result = dict(state)
    channels = config.get("latent_channels", 4)
    for option, name, width in (
        ("use_quant_conv", "quant_conv", 2 * channels),
        ("use_post_quant_conv", "post_quant_conv", channels),
    ):
        if not config.get(option, True):
            result |= {f"{name}.weight": torch.eye(width)[:, :, None, None], f"{name}.bias": torch.zeros(width)}
    return result


def scale_of(node: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """std and shift of a latent_scale node, each (1,) or (C,), float64."""
    std, shift = node.get("std", 1.0), node.get("shift", 0.0)
    std, shift = (torch.atleast_1d(torch.as_tensor(value, dtype=torch.float64)) for value in (std, shift))
    return std, shift


def single_factor(std: Tensor, shift: Tensor) -> float | None:
    """The official scale_factor, if one number is all; to 7 digits, as std is kept in float32."""
    if len(std.unique()) > 1 or bool(shift.any()):
        return None
    return float(f"{1 / float(std[0]):.7g}")


def folded(state: Mapping[str, Tensor], std: Tensor, shift: Tensor, channels: int) -> dict[str, Tensor]:
    """The weights (our names) of a first stage whose raw latents are the final latents of this one."""
    result = {name: tensor.double() if name.startswith(_CHANGED) else tensor for name, tensor in state.items()}
    std, shift = (value.expand(channels) for value in (std, shift))
    vq = "quantiser.codebook.weight" in state
    if vq and len(std.unique()) > 1:
        raise InputError(
            "latent_scale has a std per channel, under which the codebook would choose other vectors in diffusers; "
            "use --format ldmlab."
        )
    before = "to_latent" if vq else "to_moments"
    weight, bias = result[f"{before}.weight"].clone(), result[f"{before}.bias"].clone()
    weight[:channels] /= std[:, None, None, None]
    bias[:channels] = (bias[:channels] - shift) / std
    if vq:
        result["quantiser.codebook.weight"] = (result["quantiser.codebook.weight"] - shift) / std
    else:
        bias[channels:] -= 2 * std.log()  # of the log-variance
    behind = result["from_latent.weight"]  # (D, C, 1, 1)
    result |= {f"{before}.weight": weight, f"{before}.bias": bias}
    result["from_latent.bias"] = result["from_latent.bias"] + behind[:, :, 0, 0] @ shift
    result["from_latent.weight"] = behind * std[:, None, None]
    return {name: tensor.float() for name, tensor in result.items()}


_CHANGED = ("to_latent.", "to_moments.", "from_latent.", "quantiser.codebook.")
