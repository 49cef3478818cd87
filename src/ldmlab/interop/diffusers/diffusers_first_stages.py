"""diffusers' autoencoders (AutoencoderKL, VQModel, AutoencoderDC) and ours: options both ways, and a folded scale."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import levels_with_attention, named_class, resolved
from ldmlab.interop.renaming import OPTIONS, Node, State, StateDict, refuse_cosine

KL, VQ, DC = "AutoencoderKL", "VQModel", "AutoencoderDC"
_TARGETS = {
    KL: "ldmlab.first_stages.kl.KLAutoencoder",
    VQ: "ldmlab.first_stages.vq.VQModel",
    DC: "ldmlab.first_stages.deep_compression.DeepCompressionAutoencoder",
}
_OURS = ("_target_", "shortcut", "initialisation")  # what AutoencoderDC has no option for
_CASES = ("downsample_block_type", "upsample_block_type")  # written in capitals too
Config = Mapping[str, Any]
_SAME = OPTIONS["diffusers"]["first_stage"]  # diffusers => ours, our default
_CONVOLUTIONS = ("use_quant_conv", "use_post_quant_conv")
_BLOCKS = {f"{prefix}{way}coderBlock2D" for prefix in ("", "Attn") for way in ("DownEn", "UpDe")}


def kind_of(config: Config) -> str:
    """The class a configuration belongs to, also where the file does not name it."""
    marks = {"num_vq_embeddings": VQ, "encoder_block_out_channels": DC}
    return named_class(config, "first stage") or next((kind for mark, kind in marks.items() if mark in config), KL)


def arguments(config: Config) -> dict[str, Any]:
    """`_target_` and arguments of our first stage for a diffusers configuration."""
    kind = kind_of(config)
    options = resolved(config, kind, "first stage")
    if kind == DC:
        options = {name: value for name, value in options.items() if name != "scaling_factor"}
        return {"_target_": _TARGETS[kind], **options, **{name: options[name].lower() for name in _CASES}}
    attention = levels_with_attention(kind, options, "Attn", _BLOCKS)
    inner, widths = options["latent_channels"], options["block_out_channels"]
    return {
        "_target_": _TARGETS[kind],
        **{ours: options[name] for name, (ours, _) in _SAME.items()},
        "channels": widths[0],
        "channel_mult": [width / widths[0] if width % widths[0] else width // widths[0] for width in widths],
        "attention_downsampling": [2**level for level, attends in enumerate(attention) if attends],
        "latent_channels": options.get("vq_embed_dim") or inner,
        "bottleneck_channels": inner,
        **({"codebook_size": options["num_vq_embeddings"]} if kind == VQ else {}),
        **({} if kind == VQ or any(options[name] for name in _CONVOLUTIONS) else {"latent_projection": False}),
    }


def configuration(node: Node, *, image_size: int, scaling_factor: float, shift: float = 0.0) -> tuple[str, Config]:
    """diffusers' class and options for the node of a first stage of ours; InputError for what it cannot hold."""
    kind = next((kind for kind, target in _TARGETS.items() if target == node["_target_"]), None)
    if kind is None:
        raise InputError(f"first_stage={node['_target_']} has no class in diffusers; use --format ldmlab.")
    refuse_cosine(node)
    if kind == DC:
        if not node.get("shortcut", True):
            raise InputError(f"first_stage.shortcut=false: {DC} always has shortcuts; use --format ldmlab.")
        return kind, {**{k: v for k, v in node.items() if k not in _OURS}, "scaling_factor": scaling_factor}
    width = node["latent_channels"]
    inner = node.get("bottleneck_channels") or width
    if kind == KL and inner != width:
        raise InputError(
            f"first_stage.bottleneck_channels={inner}: {KL} requires latent_channels={width}; use --format compvis."
        )
    mult = list(node["channel_mult"])
    attention = ["Attn" if 2**i in node.get("attention_downsampling", ()) else "" for i in range(len(mult))]
    return kind, {
        **{name: node.get(ours, default) for name, (ours, default) in _SAME.items()},
        "block_out_channels": [round(node.get("channels", 128) * m) for m in mult],
        "down_block_types": [f"{present}DownEncoderBlock2D" for present in attention],
        "up_block_types": [f"{present}UpDecoderBlock2D" for present in reversed(attention)],
        "latent_channels": inner,
        "sample_size": image_size,
        "scaling_factor": scaling_factor,
        **({"num_vq_embeddings": node["codebook_size"], "vq_embed_dim": width} if kind == VQ else {}),
        **({"shift_factor": shift} if shift else {}),
        **({} if node.get("latent_projection", True) else dict.fromkeys(_CONVOLUTIONS, False)),
    }


def scale_of(node: Node) -> tuple[Tensor, Tensor]:
    """std and shift of a latent_scale node, each (1,) or (C,), float64."""
    pair = (torch.tensor(node.get(name, usual), dtype=torch.float64) for name, usual in (("std", 1.0), ("shift", 0.0)))
    std, shift = map(torch.atleast_1d, pair)
    return std, shift


def single_factor(std: Tensor, shift: Tensor) -> float | None:
    """The official scale_factor, if one number is all; to 7 digits, as std is kept in float32."""
    if len(std.unique()) > 1 or bool(shift.any()):
        return None
    return float(f"{1 / float(std[0]):.7g}")


def folded(node: Node, state: State, std: Tensor, shift: Tensor) -> tuple[Node, StateDict]:
    """Node and weights (our names) of a first stage whose raw latents are the final latents of this one."""
    channels = node["latent_channels"]
    if node["_target_"] == _TARGETS[DC]:
        raise InputError(
            f"latent_scale has a shift or a std per channel, and {DC} one number; use --format ldmlab, or train with "
            "stage.latent_scale=measured."
        )
    if not node.get("latent_projection", True):
        node, eye = {**node, "latent_projection": True}, {"to_moments": 2 * channels, "from_latent": channels}
        weights = {f"{name}.weight": torch.eye(width)[:, :, None, None] for name, width in eye.items()}
        state = {**state, **weights, **{f"{name}.bias": torch.zeros(width) for name, width in eye.items()}}
    changed = ("to_latent.", "to_moments.", "from_latent.", "quantiser.codebook.")
    result = {name: tensor.double() if name.startswith(changed) else tensor for name, tensor in state.items()}
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
    return node, {name: tensor.float() for name, tensor in result.items()}
