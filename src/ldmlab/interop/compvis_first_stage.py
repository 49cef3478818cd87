"""Names and options of the official first stages (CompVis/latent-diffusion) and ours, both ways."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ldmlab.errors import InputError

# The official `resolution` is the picture size at which `attn_resolutions` are counted.
_PLAIN = {
    "quant_conv": {"KLAutoencoder": "to_moments", "VQModel": "to_latent"},
    "post_quant_conv": {"KLAutoencoder": "from_latent", "VQModel": "from_latent"},
}
_BLOCK = {"nin_shortcut": "shortcut"}
_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "out"}
_MIDDLE = {"block_1": "first", "attn_1": "attention", "block_2": "second"}
_ENDS = {"conv_in": "input", "norm_out": "output_norm", "conv_out": "output"}


def arguments(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """An official configuration's `target` and `params` as `_target_` and arguments of our class."""
    ours = {"AutoencoderKL": "kl.KLAutoencoder", "VQModel": "vq.VQModel", "VQModelInterface": "vq.VQModel"}
    name = target.rpartition(".")[2]
    if name not in ours:
        raise InputError(f"first stage target={target} is not known; known are {', '.join(ours)}.")
    network = params["ddconfig"]
    plain = {
        "_target_": f"ldmlab.first_stages.{ours[name]}",
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


def _attention_factors(network: Mapping[str, Any]) -> list[int]:
    """Official pixel sizes at `resolution` as downsampling factors; sizes that no level has are without effect."""
    if network.get("attn_type", "vanilla") == "none":
        return []
    sizes = set(network["attn_resolutions"])
    return [2**level for level in range(len(network["ch_mult"])) if network["resolution"] // 2**level in sizes]


def our_name(official: str, *, kind: str, levels: int) -> str:
    """One official key (without prefix) under our name; `kind` is the name of our class."""
    head, _, rest = official.partition(".")
    if head in _PLAIN:
        return f"{_PLAIN[head][kind]}.{rest}"
    if official == "quantize.embedding.weight":
        return "quantiser.codebook.weight"
    if head not in ("encoder", "decoder"):
        raise InputError(f"{official} is not a key of an official first stage; give its weights without `loss.*`.")
    return f"{head}.{_inside(head, rest, levels)}"


def _inside(half: str, name: str, levels: int) -> str:
    """A name inside the encoder or decoder; official decoder levels count from the finest, ours as they run."""
    part, _, rest = name.partition(".")
    if part in _ENDS:
        return f"{_ENDS[part]}.{rest}"
    if part == "mid":
        which, _, leaf = rest.partition(".")
        return f"middle.{_MIDDLE[which]}.{_leaf(leaf)}"
    matched = re.fullmatch(r"(?:down|up)\.(\d+)\.(block|attn|downsample|upsample)\.(.+)", name)
    if matched is None:
        raise InputError(f"{half}.{name} is not a key of an official first stage; check the file.")
    number, group, leaf = int(matched[1]), matched[2], matched[3]
    level = number if half == "encoder" else levels - 1 - number
    if group in ("downsample", "upsample"):
        return f"levels.{level}.resample.{leaf}"
    index, _, leaf = leaf.partition(".")
    return f"levels.{level}.{'blocks' if group == 'block' else 'attentions'}.{index}.{_leaf(leaf)}"


def _leaf(name: str) -> str:
    """The end of a name, inside a residual or attention block."""
    first, _, rest = name.partition(".")
    return f"{(_BLOCK | _ATTENTION).get(first, first)}.{rest}"


def names(first_stage: nn.Module, official: Mapping[str, Any]) -> dict[str, str]:
    """Official name => our name for all keys of an official file; refuses one that does not fit the module."""
    levels = len(first_stage.encoder.levels)  # type: ignore[arg-type, union-attr]
    kind = type(first_stage).__name__
    wanted = [key for key in official if not key.startswith("loss.")]
    table = {key: our_name(key, kind=kind, levels=levels) for key in wanted}
    missing = set(first_stage.state_dict()) - set(table.values())
    extra = set(table.values()) - set(first_stage.state_dict())
    if missing or extra:
        raise InputError(
            f"the official weights do not fit the first stage: {len(missing)} missing {sorted(missing)[:3]}, "
            f"{len(extra)} unknown {sorted(extra)[:3]}; check the configuration that came with the file."
        )
    return table


def load_official(first_stage: nn.Module, official: Mapping[str, Tensor]) -> None:
    """Copy official weights (keys without prefix, `loss.*` ignored) into one of our first stages."""
    first_stage.load_state_dict({ours: official[key] for key, ours in names(first_stage, official).items()})


def export_official(first_stage: nn.Module, official: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our weights under the official names listed in `official` (only its keys are read)."""
    weights = first_stage.state_dict()
    return {key: weights[ours] for key, ours in names(first_stage, official).items()}
