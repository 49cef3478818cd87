"""Names and options of the official first stages (CompVis/latent-diffusion) and ours, both ways."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.interop.common_names import only_ours, refuse_cosine

# The official `resolution` is the image size at which `attn_resolutions` are counted.
_RESOLUTION = 256  # of the official files
_CLASSES = {"AutoencoderKL": "kl.KLAutoencoder", "VQModel": "vq.VQModel", "VQModelInterface": "vq.VQModel"}
_PLAIN = {
    "KLAutoencoder": {"to_moments": "quant_conv", "from_latent": "post_quant_conv"},
    "VQModel": {
        "to_latent": "quant_conv",
        "from_latent": "post_quant_conv",
        "quantiser.codebook": "quantize.embedding",
    },
}
_LEAF = {"shortcut": "nin_shortcut", "query": "q", "key": "k", "value": "v", "out": "proj_out"}
_MIDDLE = {"first": "block_1", "attention": "attn_1", "second": "block_2"}
_ENDS = {"input": "conv_in", "output_norm": "norm_out", "output": "conv_out"}
_RESAMPLE = {"encoder": "down.{}.downsample", "decoder": "up.{}.upsample"}

_WITHOUT_EFFECT = {"monitor", "lossconfig", "ckpt_path", "ignore_keys", "image_key", "remap", "sane_index_shape"}
_WITHOUT_EFFECT |= {"batch_resize_range", "scheduler_config", "lr_g_factor", "use_ema", "colorize_nlabels"}
_ONLY = {"in_channels": 3, "out_ch": 3, "resamp_with_conv": True, "use_linear_attn": False, "tanh_out": False}
_ONLY |= {"give_pre_end": False}
_READ = {"ch", "ch_mult", "num_res_blocks", "attn_resolutions", "attn_type", "resolution", "z_channels", "dropout"}


def arguments(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """An official configuration's `target` and `params` as `_target_` and arguments of our class."""
    name = target.rpartition(".")[2]
    if name not in _CLASSES:
        raise InputError(f"first stage target={target} is not supported; supported: {', '.join(_CLASSES)}.")
    _check(params, vq=name != "AutoencoderKL")
    network = params["ddconfig"]
    plain = {
        "_target_": f"ldmlab.first_stages.{_CLASSES[name]}",
        "channels": network["ch"],
        "channel_mult": list(network["ch_mult"]),
        "num_res_blocks": network["num_res_blocks"],
        "attention_downsampling": _attention_factors(network),
        "mid_attention": network.get("attn_type", "vanilla") != "none",
        "latent_channels": params["embed_dim"],
        "bottleneck_channels": network["z_channels"],
        "dropout": network.get("dropout", 0.0),
    }
    return plain if name == "AutoencoderKL" else plain | {"codebook_size": params["n_embed"]}


def target_of(params: Mapping[str, Any]) -> str:
    """The official class that `params` belong to: with a codebook it is the VQ model."""
    return "ldm.models.autoencoder.VQModelInterface" if "n_embed" in params else "ldm.models.autoencoder.AutoencoderKL"


def _check(params: Mapping[str, Any], *, vq: bool) -> None:
    """Refuse options that ours does not support."""
    network = params.get("ddconfig", {})
    missing = [name for name in ("embed_dim", "ddconfig", *(("n_embed",) if vq else ())) if name not in params]
    needed = _READ - {"attn_type", "dropout"}
    missing += [f"ddconfig.{name}" for name in sorted(needed - network.keys()) if "ddconfig" in params]
    if missing:
        raise InputError(f"first_stage_config.params has no {', '.join(missing)}; give the whole configuration.")
    for name in params.keys() - _WITHOUT_EFFECT - {"embed_dim", "ddconfig", "n_embed"}:
        raise InputError(f"first_stage_config.params.{name} is no option of the official first stages; check the file.")
    for name, value in network.items():
        if name in _ONLY and value != _ONLY[name]:
            raise InputError(f"ddconfig.{name}={value} is not supported; supported: {_ONLY[name]}.")
        if name not in _READ | _ONLY.keys() | {"double_z"}:
            raise InputError(f"ddconfig.{name}={value} is no option of the official first stages; check the file.")
    if network.get("double_z", not vq) == vq:
        raise InputError(f"ddconfig.double_z={network['double_z']} fits no first stage; true is for KL, false for VQ.")
    if network.get("attn_type", "vanilla") not in ("vanilla", "vanilla-xformers", "none"):
        raise InputError(f"ddconfig.attn_type={network['attn_type']} is not supported; supported: vanilla and none.")


def _attention_factors(network: Mapping[str, Any]) -> list[int]:
    """Official pixel sizes at `resolution` as downsampling factors; sizes of no level have no effect."""
    if network.get("attn_type", "vanilla") == "none":
        return []
    sizes = set(network["attn_resolutions"])
    return [2**level for level in range(len(network["ch_mult"])) if network["resolution"] // 2**level in sizes]


def params_of(node: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The official target and `params` of a first stage of ours: the inverse of `arguments`."""
    refuse_cosine(node)
    kind = str(node["_target_"]).rpartition(".")[2]
    if kind not in _PLAIN or node.get("norm_groups", 32) != 32:
        raise InputError(f"first_stage={kind} (norm_groups={node.get('norm_groups')}) has no official counterpart.")
    vq = kind == "VQModel"
    network: dict[str, Any] = {
        "double_z": not vq,
        "z_channels": node.get("bottleneck_channels") or node["latent_channels"],
        "resolution": _RESOLUTION,
        "in_channels": 3,
        "out_ch": 3,
        "ch": node.get("channels", 128),
        "ch_mult": list(node["channel_mult"]),
        "num_res_blocks": node.get("num_res_blocks", 2),
        "attn_resolutions": [_RESOLUTION // factor for factor in node.get("attention_downsampling", ())],
        "dropout": node.get("dropout", 0.0),
    }
    if not node.get("mid_attention", True):
        if network["attn_resolutions"]:
            raise InputError("first_stage.mid_attention=false with attention in levels has no official counterpart.")
        network["attn_type"] = "none"
    params = {"embed_dim": node["latent_channels"], "ddconfig": network}
    params |= {"n_embed": node["codebook_size"]} if vq else {}
    return target_of(params), params | {"lossconfig": {"target": "torch.nn.Identity"}}


def official_name(ours: str, *, kind: str, levels: int) -> str:
    """Our name under the official one (without prefix); `kind` is the name of our class."""
    module, _, leaf = ours.rpartition(".")
    if module in _PLAIN[kind]:
        return f"{_PLAIN[kind][module]}.{leaf}"
    half, _, rest = module.partition(".")
    return f"{half}.{_inside(half, rest, levels)}.{leaf}"


def _inside(half: str, module: str, levels: int) -> str:
    """A module of the encoder or decoder; official decoder levels count from the finest, ours as they run."""
    if module in _ENDS:
        return _ENDS[module]
    if module.startswith("middle."):
        which, _, leaf = module.removeprefix("middle.").partition(".")
        return f"mid.{_MIDDLE[which]}.{_LEAF.get(leaf, leaf)}"
    matched = re.fullmatch(r"levels\.(\d+)\.(blocks\.|attentions\.|resample)(?:(\d+)\.)?(.+)", module)
    assert matched is not None, module
    level = int(matched[1]) if half == "encoder" else levels - 1 - int(matched[1])
    if matched[2] == "resample":
        return _RESAMPLE[half].format(level) + matched[4]
    group = "block" if matched[2] == "blocks." else "attn"
    side = "down" if half == "encoder" else "up"
    return f"{side}.{level}.{group}.{matched[3]}.{_LEAF.get(matched[4], matched[4])}"


def names_of(first_stage: nn.Module) -> dict[str, str]:
    """Official name => our name, for every tensor that official files hold."""
    levels, kind = len(first_stage.encoder.levels), type(first_stage).__name__  # type: ignore[arg-type, union-attr]
    ours = [name for name in first_stage.state_dict() if not only_ours(name)]
    return {official_name(name, kind=kind, levels=levels): name for name in ours}


def to_ours(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Official tensors (no prefix) under our names."""
    return {ours: state[official] for official, ours in names.items()}


def to_official(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The inverse of `to_ours`."""
    return {official: state[ours] for official, ours in names.items()}
