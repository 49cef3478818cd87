"""The options of our U-Net as diffusers' classes have them; the inverse of `unets`, with its trap of heads."""

from collections.abc import Mapping, Sequence
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.unets import CONDITION, PLAIN, WITH_ATTENTION, Config


def configuration(
    arguments: Mapping[str, Any],
    *,
    sample_size: int | tuple[int, int],  # of a latent
    linear_projection: bool,
    classes: int | None = None,  # rows of a class table that becomes part of the network
) -> tuple[str, Config]:
    """diffusers' class and options for the arguments of a U-Net of ours; InputError for what it cannot hold."""
    kind = PLAIN if arguments.get("context_width") is None else CONDITION
    mult, levels = list(arguments["channel_mult"]), len(arguments["channel_mult"])
    if mult[0] != 1:
        raise InputError(
            f"backbone.channel_mult={mult}: {kind} starts at its first level's width; use --format compvis."
        )
    if arguments.get("coordinates"):
        raise InputError(f"backbone.coordinates=true: {kind} has no such option; use --format ldmlab.")
    attention = [2**level in arguments["attention_downsampling"] for level in range(levels)]
    residual = bool(arguments.get("residual_resampling", False))
    widths = [arguments["model_channels"] * m for m in mult]
    config = {
        "sample_size": sample_size,
        "in_channels": arguments["in_channels"],
        "out_channels": arguments["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": arguments["num_res_blocks"],
        "down_block_types": _types(kind, attention, residual, "Down"),
        "up_block_types": _types(kind, attention, residual, "Up")[::-1],
        "dropout": arguments.get("dropout", 0.0),
        "resnet_time_scale_shift": "scale_shift" if arguments.get("scale_shift") else "default",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
        **_class_embedding(kind, arguments, classes),
    }
    return kind, config | _attention(kind, arguments, widths, attention, linear_projection=linear_projection)


def _attention(
    kind: str,
    arguments: Mapping[str, Any],
    widths: Sequence[int],
    attention: Sequence[bool],
    *,
    linear_projection: bool,
) -> dict[str, Any]:
    """Options of attention and of what else the two classes tell differently."""
    heads = {level: _heads_at(arguments, width) for level, width in enumerate(widths)}
    if kind == CONDITION:
        return {
            "cross_attention_dim": arguments["context_width"],
            "transformer_layers_per_block": arguments.get("transformer_depth", 1),
            "attention_head_dim": list(heads.values()) if len(set(heads.values())) > 1 else heads[0],
            "use_linear_projection": linear_projection,
        }
    last = len(widths) - 1  # the middle has its width
    used = {widths[level] // heads[level] for level in heads if attention[level] or level == last}
    if len(used) > 1:
        raise InputError(
            f"backbone.heads={arguments['heads']}: {PLAIN} wants heads of one width; use --format compvis."
        )
    way = "resnet" if arguments.get("residual_resampling") else "conv"
    groups = 32 if arguments.get("scale_shift") else None
    sizes = {"attention_head_dim": used.pop(), "attn_norm_num_groups": groups}
    return {**sizes, "downsample_type": way, "upsample_type": way}


def _class_embedding(kind: str, arguments: Mapping[str, Any], classes: int | None) -> dict[str, Any]:
    width = arguments.get("vector_width")
    if width is None or classes is not None:
        return {} if classes is None else {"num_class_embeds": classes}
    if kind == PLAIN:
        raise InputError(f"backbone.vector_width={width}: {PLAIN} takes classes only; use --format ldmlab.")
    if not arguments.get("project_vector", True):
        return {"class_embed_type": "identity"}
    return {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": width}


def _heads_at(arguments: Mapping[str, Any], width: int) -> int:
    """Number of heads at a level; 1 for a level without attention that the heads would not divide."""
    if arguments.get("heads") is not None:
        return int(arguments["heads"])
    return max(width // int(arguments["head_channels"]), 1)


def _types(kind: str, attention: Sequence[bool], residual: bool, way: str) -> list[str]:
    """Kinds of levels, from the finest."""
    names = []
    for level, present in enumerate(attention):
        joined = residual and level != (len(attention) - 1 if way == "Down" else 0)  # the end of the way has none
        if present and joined and kind == CONDITION:
            raise InputError(
                f"backbone.residual_resampling=True beside cross-attention: {CONDITION} has no such level; "
                "use --format compvis."
            )
        plain = f"Resnet{way}sampleBlock2D" if joined else f"{way}Block2D"
        names.append(f"{WITH_ATTENTION[kind]}{way}Block2D" if present else plain)
    return names
