"""The official U-Net's tensor names and ours: a pure function of the architecture.

Official names are those after `model.diffusion_model.`; see `openaimodel.py` of CompVis/latent-diffusion.
The 1 x 1 convolutions of the official attention blocks are linear layers here, so their weights lose the empty axes.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.common_names import Pairs, spatial_transformer, under

_RES = {
    "in_layers.0": "norm_in",
    "in_layers.2": "conv_in",
    "emb_layers.1": "emb",
    "out_layers.0": "norm_out",
    "out_layers.3": "conv_out",
    "skip_connection": "skip",
}
_PIXEL_ATTENTION = {"norm": "norm", "qkv": "qkv", "proj_out": "out"}
_ENDS = {
    "time_embed.0": "time.expand",
    "time_embed.2": "time.mix",
    "input_blocks.0.0": "conv_in",
    "out.0": "norm_out",
    "out.2": "conv_out",
}
Arguments = Mapping[str, Any]  # of our U-Net


def names_of(arguments: Arguments) -> dict[str, str]:
    """Official module name => ours, for every module that holds tensors; some (skip connections) may be absent."""
    ways = (_way_down(arguments), _middle(arguments), _way_up(arguments))
    return _ENDS | {official: ours for way in ways for official, ours in way}


def _way_down(arguments: Arguments) -> Pairs:
    """Official indices count blocks and downsamplers, after the first convolution."""
    levels, blocks = len(arguments["channel_mult"]), arguments["num_res_blocks"]
    for i in range(levels):
        first = 1 + i * (blocks + 1)
        for j in range(blocks):
            yield from _block(f"input_blocks.{first + j}", f"down.{i}.blocks.{j}", arguments, _attends(arguments, i))
        if i < levels - 1:
            yield from _resampler(f"input_blocks.{first + blocks}.0", f"down.{i}.resample", "op", arguments)


def _middle(arguments: Arguments) -> Pairs:
    """Residual block, attention, residual block: we keep the first two in one block."""
    yield from _block("middle_block", "middle.0", arguments, True)
    yield from under("middle_block.2", "middle.1.res", _RES)


def _way_up(arguments: Arguments) -> Pairs:
    """Levels from the coarsest; the upsampler is inside the last block of a level."""
    levels, blocks = len(arguments["channel_mult"]), arguments["num_res_blocks"] + 1
    for i in range(levels):
        attends, last = _attends(arguments, levels - 1 - i), (i + 1) * blocks - 1
        for j in range(blocks):
            yield from _block(f"output_blocks.{i * blocks + j}", f"up.{i}.blocks.{j}", arguments, attends)
        if i < levels - 1:
            yield from _resampler(f"output_blocks.{last}.{1 + attends}", f"up.{i}.resample", "conv", arguments)


def _attends(arguments: Arguments, level: int) -> bool:
    return 2**level in arguments["attention_downsampling"]


def _block(official: str, ours: str, arguments: Arguments, attends: bool) -> Pairs:
    """A residual block, with attention over pixels or a spatial transformer if there is one."""
    yield from under(f"{official}.0", f"{ours}.res", _RES)
    if not attends:
        return
    if arguments.get("context_width") is None:
        yield from under(f"{official}.1", f"{ours}.attention", _PIXEL_ATTENTION)
    else:
        yield from spatial_transformer(f"{official}.1", f"{ours}.attention", arguments.get("transformer_depth", 1))


def _resampler(official: str, ours: str, convolution: str, arguments: Arguments) -> Pairs:
    return under(official, ours, _RES if arguments.get("residual_resampling") else {convolution: "conv"})


# Options of the official class that leave the function as it is, and the only value of others that ours is built for.
_WITHOUT_EFFECT = {"image_size", "use_checkpoint", "use_fp16", "use_bf16", "legacy", "use_linear_in_transformer"}
CLASS_TABLE = "label_emb.weight"  # with num_classes: rows are the U-Net's vector conditioning, in a conditioner here
_ONLY = {
    **{"conv_resample": True, "dims": 2, "use_new_attention_order": False, "disable_middle_self_attn": False},
    **dict.fromkeys(("n_embed", "disable_self_attentions", "num_attention_blocks", "adm_in_channels")),
}
_READ = {
    *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    *("num_heads", "num_head_channels", "num_heads_upsample", "use_spatial_transformer", "transformer_depth"),
    *("context_dim", "dropout", "use_scale_shift_norm", "resblock_updown", "num_classes"),
}


def arguments(params: Mapping[str, Any]) -> dict[str, Any]:
    """Our U-Net's arguments for the `params` of an official `unet_config`."""
    _check(params)
    context = _one(params, "context_dim") if params.get("use_spatial_transformer") else None
    sizes = {"heads": params.get("num_heads", -1), "head_channels": params.get("num_head_channels", -1)}
    if sizes["head_channels"] != -1:  # wins over num_heads in the official code
        sizes["heads"] = -1
    return {
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "model_channels": params["model_channels"],
        "channel_mult": list(params.get("channel_mult", (1, 2, 4, 8))),
        "num_res_blocks": _one(params, "num_res_blocks"),
        "attention_downsampling": list(params["attention_resolutions"]),
        **{name: None if value == -1 else value for name, value in sizes.items()},
        "transformer_depth": _one(params, "transformer_depth") if "transformer_depth" in params else 1,
        "context_width": context,
        "dropout": params.get("dropout", 0.0),
        "scale_shift": params.get("use_scale_shift_norm", False),
        "residual_resampling": params.get("resblock_updown", False),
        **_vector(params),
    }


def _vector(params: Mapping[str, Any]) -> dict[str, Any]:
    """Rows of the official class table are as wide as the time vector and added to it as they are."""
    classes = params.get("num_classes")
    if classes is None:
        return {}
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 1:
        raise InputError(f"unet_config.params.num_classes={classes} is not supported; supported: a number of classes.")
    return {"vector_width": 4 * params["model_channels"], "project_vector": False}


def _check(params: Mapping[str, Any]) -> None:
    """Refuse options that ours does not support."""
    needed = ("in_channels", "out_channels", "model_channels", "num_res_blocks", "attention_resolutions")
    missing = [name for name in needed if name not in params]
    missing += ["context_dim"] if params.get("use_spatial_transformer") and not params.get("context_dim") else []
    if missing:
        raise InputError(f"unet_config.params has no {', '.join(missing)}; give the whole official configuration.")
    for name, value in params.items():
        if name in _ONLY and value != _ONLY[name]:
            raise InputError(f"unet_config.params.{name}={value} is not supported; supported: {_ONLY[name]}.")
        if name not in _WITHOUT_EFFECT | _ONLY.keys() | _READ:
            raise InputError(f"unet_config.params.{name}={value} is no option of the official U-Net; check the file.")
    if params.get("num_heads_upsample", -1) not in (-1, params.get("num_heads", -1)):
        raise InputError(
            "unet_config.params.num_heads_upsample differs from num_heads, but ldmlab's U-Net needs one value."
        )


def _one(params: Mapping[str, Any], name: str) -> int:
    """A number that Stability's files may repeat for every level."""
    value = params[name]
    numbers = {value} if isinstance(value, int) else set(value)
    if len(numbers) != 1:
        raise InputError(
            f"unet_config.params.{name}={value} differs between levels, but ldmlab's U-Net needs one value."
        )
    return int(numbers.pop())


def params_of(node: Mapping[str, Any], classes: int | None = None) -> dict[str, Any]:
    """The official `params` of a U-Net of ours, and of its class table: the inverse of `arguments`."""
    if node.get("vector_width") and (classes is None or node.get("project_vector", True)):
        raise InputError(
            "the official U-Net of CompVis takes no vector conditioning but the rows of a class table, as they are "
            "(backbone.project_vector=false); export another format."
        )
    usual = {"coordinates": False, "asymmetric_downsampling": False, "norm_eps": 1e-5, "frequency_shift": 0}
    for option, value in usual.items():
        if node.get(option, value) != value:
            raise InputError(
                f"backbone.{option}={node[option]} is no option of the official U-Net; use --format ldmlab."
            )
    params: dict[str, Any] = {
        "image_size": 32,  # read by nothing
        "in_channels": node["in_channels"],
        "out_channels": node["out_channels"],
        "model_channels": node["model_channels"],
        "attention_resolutions": list(node["attention_downsampling"]),
        "num_res_blocks": node["num_res_blocks"],
        "channel_mult": list(node["channel_mult"]),
        "dropout": node.get("dropout", 0.0),
    }
    heads, head_channels = node.get("heads"), node.get("head_channels")
    params |= {"num_heads": heads} if heads else {"num_head_channels": head_channels}
    if node.get("context_width"):
        depth, width = node.get("transformer_depth", 1), node["context_width"]
        params |= {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": width, "legacy": False}
    params |= {"num_classes": classes} if classes is not None else {}
    flags = {"use_scale_shift_norm": "scale_shift", "resblock_updown": "residual_resampling"}
    return params | {official: True for official, ours in flags.items() if node.get(ours)}


def to_ours(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Official tensors (no prefix) under our names; a tensor of no module is an error (KeyError)."""
    result = {}
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        linear = ".attention." in names[module] and tensor.ndim > 2
        result[f"{names[module]}.{leaf}"] = tensor.flatten(1) if linear else tensor
    return result


def to_official(
    state: Mapping[str, Tensor], names: Mapping[str, str], linear_projection: bool = False
) -> dict[str, Tensor]:
    """The inverse of `to_ours`; with `linear_projection` as in Stable Diffusion 2.x (2-d proj_in and proj_out)."""
    official = {ours: official for official, ours in names.items()}
    result = {}
    for key, tensor in state.items():
        module, leaf = key.rsplit(".", 1)
        if leaf == "weight" and module.endswith((".attention.qkv", ".attention.out")):
            tensor = tensor[:, :, None]
        elif leaf == "weight" and module.endswith((".proj_in", ".proj_out")) and not linear_projection:
            tensor = tensor[:, :, None, None]
        result[f"{official[module]}.{leaf}"] = tensor
    return result
