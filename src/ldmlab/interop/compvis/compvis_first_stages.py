"""Options of the official first stages (CompVis/latent-diffusion) and ours, both ways."""

from collections.abc import Mapping
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.renaming import OPTIONS, refuse_cosine

RESOLUTION = 256  # of the official files: the image size at which `attn_resolutions` are counted
_CLASSES = {"AutoencoderKL": "kl.KLAutoencoder", "VQModel": "vq.VQModel", "VQModelInterface": "vq.VQModel"}
_TABLES = OPTIONS["compvis"]["first_stage"]
_NETWORK, _ONLY = _TABLES["ours"], _TABLES["only"]
_KNOWN = {*_NETWORK, *_ONLY, "attn_resolutions", "resolution", "attn_type", "double_z"}


def arguments(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """An official configuration's `target` and `params` as `_target_` and arguments of our class."""
    name = target.rpartition(".")[2]
    if name not in _CLASSES:
        raise InputError(f"first stage target={target} is not supported; supported: {', '.join(_CLASSES)}.")
    vq = name != "AutoencoderKL"
    _check(params, vq=vq)
    network = {"dropout": 0.0, **params["ddconfig"]}
    attends = network.get("attn_type", "vanilla") != "none"
    sizes = [network["resolution"] // 2**level for level in range(len(network["ch_mult"]))]
    return {
        "_target_": f"ldmlab.first_stages.{_CLASSES[name]}",
        **{ours: network[official] for official, ours in _NETWORK.items()},
        "channel_mult": list(network["ch_mult"]),
        "attention_downsampling": [
            2**level for level, size in enumerate(sizes) if attends and size in network["attn_resolutions"]
        ],
        "mid_attention": attends,
        "latent_channels": params["embed_dim"],
        **({"codebook_size": params["n_embed"]} if vq else {}),
    }


def target_of(params: Mapping[str, Any]) -> str:
    """The official class that `params` belong to: with a codebook it is the VQ model."""
    return "ldm.models.autoencoder." + ("VQModelInterface" if "n_embed" in params else "AutoencoderKL")


def _check(params: Mapping[str, Any], *, vq: bool) -> None:
    network = params.get("ddconfig", {})
    missing = [name for name in ("embed_dim", "ddconfig", *(("n_embed",) if vq else ())) if name not in params]
    needed = {*_NETWORK, "attn_resolutions", "resolution"} - {"dropout"}
    missing += [f"ddconfig.{name}" for name in sorted(needed - network.keys()) if "ddconfig" in params]
    if missing:
        raise InputError(f"first_stage_config.params has no {', '.join(missing)}; give the whole configuration.")
    for name in params.keys() - {*_TABLES["without_effect"]} - {"embed_dim", "ddconfig", "n_embed"}:
        raise InputError(f"first_stage_config.params.{name} is no option of the official first stages; check the file.")
    for name, value in network.items():
        if name in _ONLY and value != _ONLY[name]:
            raise InputError(f"ddconfig.{name}={value} is not supported; supported: {_ONLY[name]}.")
        if name not in _KNOWN:
            raise InputError(f"ddconfig.{name}={value} is no option of the official first stages; check the file.")
    if network.get("double_z", not vq) == vq:
        raise InputError(f"ddconfig.double_z={network['double_z']} fits no first stage; true is for KL, false for VQ.")
    if network.get("attn_type", "vanilla") not in ("vanilla", "vanilla-xformers", "none"):
        raise InputError(f"ddconfig.attn_type={network['attn_type']} is not supported; supported: vanilla and none.")


def params_of(node: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The official target and `params` of a first stage of ours: the inverse of `arguments`."""
    refuse_cosine(node)
    kind = str(node["_target_"]).rpartition(".")[2]
    plain = node.get("norm_groups", 32) == 32 and node.get("latent_projection", True)
    if kind not in ("KLAutoencoder", "VQModel") or not plain:
        options = {name: node[name] for name in ("norm_groups", "latent_projection") if name in node}
        raise InputError(f"first_stage={kind} ({options}) has no official counterpart.")
    width = node["latent_channels"]
    full = {"channels": 128, "num_res_blocks": 2, "dropout": 0.0, **node}
    full["bottleneck_channels"] = node.get("bottleneck_channels") or width
    network = {
        "double_z": kind == "KLAutoencoder",
        "resolution": RESOLUTION,
        "in_channels": 3,
        "out_ch": 3,
        **{official: full[ours] for official, ours in _NETWORK.items()},
        "ch_mult": list(node["channel_mult"]),
        "attn_resolutions": [RESOLUTION // factor for factor in node.get("attention_downsampling", ())],
    }
    if not node.get("mid_attention", True):
        if network["attn_resolutions"]:
            raise InputError("first_stage.mid_attention=false with attention in levels has no official counterpart.")
        network["attn_type"] = "none"
    params = {"embed_dim": width, "ddconfig": network, "lossconfig": {"target": "torch.nn.Identity"}}
    params |= {"n_embed": node["codebook_size"]} if kind == "VQModel" else {}
    return target_of(params), params
