"""The options of diffusers' U-Nets (UNet2DConditionModel, UNet2DModel; read from version 0.42) and of ours, both ways.

Note: `attention_head_dim` of UNet2DConditionModel is the NUMBER of heads, of UNet2DModel the width of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import levels_with_attention, multiples, named_class, resolved
from ldmlab.interop.renaming import OPTIONS

CONDITION, PLAIN = "UNet2DConditionModel", "UNet2DModel"
TARGET = "ldmlab.backbones.unet.UNet"
Config = Mapping[str, Any]
_SAME = OPTIONS["diffusers"]["unet"]  # diffusers => ours, default
WITH_ATTENTION = {CONDITION: "CrossAttn", PLAIN: "Attn"}


def kind_of(config: Config) -> str:
    """The class a configuration belongs to, also where the file does not name it."""
    if named := named_class(config, "U-Net"):
        return named
    types = [*config.get("down_block_types", ()), config.get("mid_block_type") or ""]
    tokens = "cross_attention_dim" in config or any("CrossAttn" in kind for kind in types)
    return CONDITION if tokens else PLAIN


def arguments(config: Config) -> dict[str, Any]:
    """Our U-Net's arguments for a diffusers configuration."""
    kind = kind_of(config)
    options = resolved(config, kind, "U-Net")
    options["layers_per_block"] = _one(kind, options, "layers_per_block")
    mark = WITH_ATTENTION[kind]
    known = {f"{prefix}{way}2D" for prefix in ("", mark) for way in ("DownBlock", "UpBlock")}
    known |= {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}
    attention = levels_with_attention(kind, options, mark, known)
    scaled, groups = options["resnet_time_scale_shift"] == "scale_shift", options.get("attn_norm_num_groups")
    if kind == PLAIN and groups != 32 and (groups is not None or scaled):  # the middle has that norm by option only
        raise InputError(f"{kind} with attn_norm_num_groups={groups} is not supported; supported: 32.")
    return {
        **{ours: options[name] for name, (ours, _) in _SAME.items()},
        "model_channels": options["block_out_channels"][0],
        "channel_mult": multiples(kind, options["block_out_channels"]),
        "attention_downsampling": [2**level for level, present in enumerate(attention) if present],
        **_heads(kind, options, attention),
        "transformer_depth": _one(kind, options, "transformer_layers_per_block") if kind == CONDITION else 1,
        "context_width": _one(kind, options, "cross_attention_dim") if kind == CONDITION else None,
        "scale_shift": scaled,
        "residual_resampling": _residual_resampling(kind, options),
        # pad right and bottom only where a convolution halves, as published DDPM models do
        "asymmetric_downsampling": options["downsample_padding"] == 0,
        **_vector(kind, options),
    }


def _vector(kind: str, options: Config) -> dict[str, Any]:
    """The class embedding: a table (a conditioner here, its rows added as they are) or one linear layer."""
    embedding = options["class_embed_type"]
    if embedding is None and options["num_class_embeds"] is None:
        return {}
    if embedding is None:
        return {"vector_width": 4 * options["block_out_channels"][0], "project_vector": False}
    if embedding == "simple_projection" and kind == CONDITION:
        return {"vector_width": options["projection_class_embeddings_input_dim"]}
    raise InputError(
        f"{kind} with class_embed_type={embedding} is not supported; supported: a table "
        "(num_class_embeds) or simple_projection."
    )


def _one(kind: str, options: Config, key: str) -> int:
    """An option that may differ between levels in diffusers, but not here."""
    values = options[key] if isinstance(options[key], list) else [options[key]]
    if len(set(map(str, values))) != 1:
        raise InputError(f"{kind} with {key}={values} differs between levels; ldmlab's U-Net needs one value.")
    return int(values[0])


def _heads(kind: str, options: Config, attention: Sequence[bool]) -> dict[str, int | None]:
    """Number of heads or width of a head, whichever is the same at every place with attention."""
    size, widths = options["attention_head_dim"], options["block_out_channels"]
    if kind == PLAIN:
        return {"heads": 1 if size is None else None, "head_channels": size}
    heads = size if isinstance(size, list) else [size] * len(widths)
    used = [level for level, present in enumerate(attention) if present] + [len(widths) - 1]  # the middle is last
    counts, channels = {heads[level] for level in used}, {widths[level] // heads[level] for level in used}
    if len(counts) > 1 and len(channels) > 1:
        raise InputError(
            f"{kind} with attention_head_dim={size}: neither heads nor their width agree; use another one."
        )
    same_count = len(counts) == 1
    return {"heads": counts.pop() if same_count else None, "head_channels": None if same_count else channels.pop()}


def _residual_resampling(kind: str, options: Config) -> bool:
    """Whether levels are joined by residual blocks instead of convolutions; all levels must agree."""
    found = set()
    for way, option in (("down_block_types", "downsample_type"), ("up_block_types", "upsample_type")):
        for name in options[way][:-1]:
            by_option = name.startswith("Attn") and options[option] == "resnet"
            found.add(name.startswith("Resnet") or by_option)
    if len(found) > 1:
        raise InputError(
            f"{kind} mixes residual and plain resampling ({options['down_block_types']}); use another one."
        )
    return found == {True}


def configuration(
    arguments: Mapping[str, Any],
    *,
    sample_size: int | tuple[int, int],  # of a latent
    linear_projection: bool,
    classes: int | None = None,  # rows of a class table that becomes part of the network
) -> tuple[str, Config]:
    """diffusers' class and options for the arguments of a U-Net of ours; InputError for what it cannot hold."""
    kind = PLAIN if arguments.get("context_width") is None else CONDITION
    mult = list(arguments["channel_mult"])
    if mult[0] != 1:
        raise InputError(
            f"backbone.channel_mult={mult}: {kind} starts at its first level's width; use --format compvis."
        )
    if arguments.get("coordinates"):
        raise InputError(f"backbone.coordinates=true: {kind} has no such option; use --format ldmlab.")
    attention = [2**level in arguments["attention_downsampling"] for level in range(len(mult))]
    residual = bool(arguments.get("residual_resampling", False))
    widths = [arguments["model_channels"] * m for m in mult]
    config = {
        "sample_size": sample_size,
        **{name: arguments.get(ours, default) for name, (ours, default) in _SAME.items()},
        "block_out_channels": widths,
        "down_block_types": _types(kind, attention, residual, "Down"),
        "up_block_types": _types(kind, attention, residual, "Up")[::-1],
        "resnet_time_scale_shift": "scale_shift" if arguments.get("scale_shift") else "default",
        "norm_num_groups": 32,
        "flip_sin_to_cos": True,
        "downsample_padding": 0 if arguments.get("asymmetric_downsampling") else 1,
        **_class_embedding(kind, arguments, classes),
    }
    return kind, config | _attention(kind, arguments, widths, attention, linear_projection)


def _attention(
    kind: str, arguments: Mapping[str, Any], widths: Sequence[int], attention: Sequence[bool], linear_projection: bool
) -> dict[str, Any]:
    """Options of attention and of what else differs between the two classes."""
    # 1 for a level without attention that the heads would not divide
    heads = [arguments.get("heads") or max(width // int(arguments["head_channels"]), 1) for width in widths]
    if kind == CONDITION:
        return {
            "cross_attention_dim": arguments["context_width"],
            "transformer_layers_per_block": arguments.get("transformer_depth", 1),
            "attention_head_dim": heads if len(set(heads)) > 1 else heads[0],
            "use_linear_projection": linear_projection,
        }
    places = [*zip(widths, heads, attention, strict=True), (widths[-1], heads[-1], True)]  # the middle is last
    used = {width // count for width, count, attends in places if attends}
    if len(used) > 1:
        raise InputError(
            f"backbone.heads={arguments['heads']}: {PLAIN} requires heads of one width; use --format compvis."
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


def _types(kind: str, attention: Sequence[bool], residual: bool, way: str) -> list[str]:
    """Kinds of levels, from the finest."""
    names = []
    for level, present in enumerate(attention):
        joined = residual and level != (len(attention) - 1 if way == "Down" else 0)  # the end of the way has none
        if present and joined and kind == CONDITION:
            raise InputError(
                f"backbone.residual_resampling=True with cross-attention: {CONDITION} has no such level; "
                "use --format compvis."
            )
        plain = f"Resnet{way}sampleBlock2D" if joined else f"{way}Block2D"
        names.append(f"{WITH_ATTENTION[kind]}{way}Block2D" if present else plain)
    return names
