"""The options of diffusers' U-Nets (UNet2DConditionModel, UNet2DModel; read from version 0.42) and of ours, both ways.

Note: `attention_head_dim` of UNet2DConditionModel is the NUMBER of heads, of UNet2DModel the width of one.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.diffusers.diffusers_config import levels_with_attention, multiples, named_class, resolved

CONDITION, PLAIN = "UNet2DConditionModel", "UNet2DModel"
Config = Mapping[str, Any]
_SHARED = {
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "dropout": 0.0,
    "resnet_time_scale_shift": "default",
    "class_embed_type": None,
    "num_class_embeds": None,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    CONDITION: _SHARED
    | {
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "use_linear_projection": False,
        "projection_class_embeddings_input_dim": None,
    },
    PLAIN: _SHARED
    | {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownBlock2D"] + ["AttnDownBlock2D"] * 3,
        "up_block_types": ["AttnUpBlock2D"] * 3 + ["UpBlock2D"],
        "block_out_channels": [224, 448, 672, 896],
        "attn_norm_num_groups": None,
    },
}
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "add_attention": (True,),
    "attention_type": ("default",),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "mid_block_scale_factor": (1,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "norm_num_groups": (32,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_type": ("positional",),
}
WITH_ATTENTION = {CONDITION: "CrossAttn", PLAIN: "Attn"}


def kind_of(config: Config) -> str:
    """The class a configuration belongs to, also where the file does not name it."""
    if named := named_class(config, _DEFAULTS, "the U-Net"):
        return named
    types = [*config.get("down_block_types", ()), config.get("mid_block_type") or ""]
    tokens = "cross_attention_dim" in config or any("CrossAttn" in kind for kind in types)
    return CONDITION if tokens else PLAIN


def arguments(config: Config) -> dict[str, Any]:
    """Our U-Net's arguments for a diffusers configuration."""
    kind = kind_of(config)
    options = resolved(config, kind, _DEFAULTS[kind], _REQUIRED)
    attention = _attention_levels(kind, options)
    return {
        "in_channels": options["in_channels"],
        "out_channels": options["out_channels"],
        "model_channels": options["block_out_channels"][0],
        "channel_mult": multiples(kind, options["block_out_channels"]),
        "num_res_blocks": _one(kind, options, "layers_per_block"),
        "attention_downsampling": [2**level for level, present in enumerate(attention) if present],
        **_heads(kind, options, attention),
        "transformer_depth": _one(kind, options, "transformer_layers_per_block") if kind == CONDITION else 1,
        "context_width": _one(kind, options, "cross_attention_dim") if kind == CONDITION else None,
        "dropout": options["dropout"],
        "scale_shift": _scale_shift(kind, options),
        "residual_resampling": _residual_resampling(kind, options),
        "asymmetric_downsampling": _asymmetric(kind, options),
        "norm_eps": options["norm_eps"],
        "frequency_shift": options["freq_shift"],
        **_vector(kind, options),
    }


def _vector(kind: str, options: Config) -> dict[str, Any]:
    """The class embedding: a table (a conditioner here, its rows added as they are) or one linear layer."""
    embedding, classes = options["class_embed_type"], options["num_class_embeds"]
    if embedding is None:
        return (
            {} if classes is None else {"vector_width": 4 * options["block_out_channels"][0], "project_vector": False}
        )
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


def _attention_levels(kind: str, options: Config) -> list[bool]:
    mark = WITH_ATTENTION[kind]
    known = {f"{prefix}{way}2D" for prefix in ("", mark) for way in ("DownBlock", "UpBlock")}
    return levels_with_attention(kind, options, mark, known | {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"})


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
    return (
        {"heads": counts.pop(), "head_channels": None}
        if len(counts) == 1
        else {
            "heads": None,
            "head_channels": channels.pop(),
        }
    )


def _scale_shift(kind: str, options: Config) -> bool:
    """Whether time scales and shifts norms; the middle of UNet2DModel then has a norm only by option."""
    rule = options["resnet_time_scale_shift"]
    if rule not in ("default", "scale_shift"):
        raise InputError(
            f"{kind} with resnet_time_scale_shift={rule} is not supported; supported: default, scale_shift."
        )
    groups = options.get("attn_norm_num_groups")
    if kind == PLAIN and groups != 32 and (groups is not None or rule == "scale_shift"):
        raise InputError(f"{kind} with attn_norm_num_groups={groups} is not supported; supported: 32.")
    return bool(rule == "scale_shift")


def _asymmetric(kind: str, options: Config) -> bool:
    """Whether convolutions that halve pad the right and the bottom only (padding 0, as published DDPM models have)."""
    padding = options["downsample_padding"]
    if padding not in (0, 1):
        raise InputError(f"{kind} with downsample_padding={padding} is not supported; supported: 0, 1.")
    return bool(padding == 0)


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
        "norm_eps": arguments.get("norm_eps", 1e-5),
        "flip_sin_to_cos": True,
        "freq_shift": arguments.get("frequency_shift", 0),
        "downsample_padding": 0 if arguments.get("asymmetric_downsampling") else 1,
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
    """Options of attention and of what else differs between the two classes."""
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
                f"backbone.residual_resampling=True with cross-attention: {CONDITION} has no such level; "
                "use --format compvis."
            )
        plain = f"Resnet{way}sampleBlock2D" if joined else f"{way}Block2D"
        names.append(f"{WITH_ATTENTION[kind]}{way}Block2D" if present else plain)
    return names
