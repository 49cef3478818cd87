"""Official configurations for single files that come without one, derived from the shapes of their weights.

Keys carry no prefix. Shapes determine all of a first stage and, of a U-Net, all but the number of attention heads; that
follows from the family: Stable Diffusion 1.x and 2.x, and the paper's large text model.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.compvis.compvis_file import OfficialFile, schedule_params
from ldmlab.interop.compvis.compvis_first_stages import target_of

_RESOLUTION = 256  # image size at which the official configurations count `attn_resolutions`
State = Mapping[str, Tensor]


def unet_params(state: State) -> dict[str, Any]:
    """`unet_config.params` without `num_heads` or `num_head_channels`."""
    if not {"input_blocks.0.0.weight", "out.2.weight"} <= state.keys():
        raise InputError("there is no complete U-Net in this file; give the file of the whole model.")
    resamplers = _matches(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers\.0)\.weight", state)
    outputs = _matches(r"output_blocks\.(\d+)\.0\.in_layers\.0\.weight", state)
    levels = len(resamplers) + 1
    per_level = len(outputs) // levels  # residual blocks and one more
    first_blocks = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    model_channels, in_channels = state["input_blocks.0.0.weight"].shape[:2]
    widths = [_rows(state, f"{block}.0.out_layers.3.weight") for block in first_blocks]
    depth = len(_matches(r"middle_block\.1\.transformer_blocks\.(\d+)\.norm1\.weight", state))
    params = {
        "in_channels": in_channels,
        "out_channels": _rows(state, "out.2.weight"),
        "model_channels": model_channels,
        "attention_resolutions": [2**i for i, block in enumerate(first_blocks) if f"{block}.1.norm.weight" in state],
        "num_res_blocks": per_level - 1,
        "channel_mult": _multiples(widths, model_channels, "U-Net"),
    }
    if depth:
        context = state["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1]
        params |= {"use_spatial_transformer": True, "transformer_depth": depth, "context_dim": context}
    if _rows(state, "input_blocks.1.0.emb_layers.1.weight") == 2 * widths[0]:
        params["use_scale_shift_norm"] = True
    if any(re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", key) for key in state):
        params["resblock_updown"] = True
    return params


def linear_projections(state: State) -> bool:
    """Whether spatial transformers project by linear layers (Stable Diffusion 2.x) instead of 1 x 1 convolutions."""
    return any(key.endswith(".proj_in.weight") and tensor.ndim == 2 for key, tensor in state.items())


def first_stage_params(state: State) -> dict[str, Any]:
    """`params` of a first stage; with a codebook it is a VQ model."""
    if not {"encoder.conv_in.weight", "encoder.conv_out.weight", "post_quant_conv.weight"} <= state.keys():
        raise InputError("there is no complete first stage in this file; give another file.")
    codebook = state.get("quantize.embedding.weight")
    levels = len(_matches(r"encoder\.down\.(\d+)\.block\.0\.norm1\.weight", state))
    blocks = len(_matches(r"encoder\.down\.0\.block\.(\d+)\.norm1\.weight", state))
    channels = _rows(state, "encoder.conv_in.weight")
    widths = [_rows(state, f"encoder.down.{level}.block.0.conv2.weight") for level in range(levels)]
    attention = [level for level in range(levels) if f"encoder.down.{level}.attn.0.norm.weight" in state]
    out = _rows(state, "encoder.conv_out.weight")
    network = {
        "double_z": codebook is None,
        "z_channels": out if codebook is not None else out // 2,
        "resolution": _RESOLUTION,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels,
        "ch_mult": _multiples(widths, channels, "first stage"),
        "num_res_blocks": blocks,
        "attn_resolutions": [_RESOLUTION // 2**level for level in attention],
        "dropout": 0.0,
    }
    if "encoder.mid.attn_1.norm.weight" not in state:
        network["attn_type"] = "none"
    params: dict[str, Any] = {"embed_dim": state["post_quant_conv.weight"].shape[1], "ddconfig": network}
    return params if codebook is None else params | {"n_embed": len(codebook)}


def _matches(pattern: str, state: State) -> set[str]:
    """The different numbers that a pattern of names finds."""
    return {found[1] for key in state if (found := re.fullmatch(pattern, key))}


def _rows(state: State, key: str) -> int:
    if key not in state:
        raise InputError(f"{key} is missing, so the network cannot be derived from shapes; give --config.")
    return state[key].shape[0]


def _multiples(widths: list[int], base: int, part: str) -> list[int]:
    if any(width % base for width in widths):
        raise InputError(f"the {part}'s widths {widths} are no multiples of {base}; give --config.")
    return [width // base for width in widths]


Node = dict[str, Any]
_MODULES = "ldm.modules.encoders.modules."
_SD_BETAS = {"linear_start": 0.00085, "linear_end": 0.0120, "timesteps": 1000}
_SD_SCALE = 0.18215
_LARGE_TEXT = (320, 1280)  # width of the finest level and of the tokens: the 1.45 billion parameter model


def config_of(file: OfficialFile, prediction: str | None) -> Node:
    """`{target, params}` as in an official YAML file; InputError where the weights do not determine it."""
    if file.is_first_stage:
        params = first_stage_params(file.first_stage)
        return {"target": target_of(params), "params": params}
    unet = unet_params(file.unet)
    first_stage = first_stage_params(file.first_stage)
    family = _family(file, unet, prediction)
    hybrid = unet["in_channels"] == 2 * unet["out_channels"] + 1  # mask and masked latent: the inpainting models
    if unet["in_channels"] != unet["out_channels"] and not hybrid:
        raise InputError(f"a U-Net of {unet['in_channels']} input channels needs --config to name them.")
    params = {
        "channels": unet["out_channels"],
        "conditioning_key": "hybrid" if hybrid else "crossattn",
        "cond_stage_key": "txt",
        **schedule_params(file, _SD_BETAS),
        **{name: value for name, value in family.items() if name != "heads"},
        "scale_factor": _SD_SCALE,
        "unet_config": {"params": unet | family["heads"]},
        "first_stage_config": {"target": target_of(first_stage), "params": first_stage},
    }
    return {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}


def _family(file: OfficialFile, unet: Mapping[str, Any], prediction: str | None) -> Node:
    """Heads, conditioner, prediction and size of latents, by the names of the conditioner's tensors."""
    names = file.conditioner.keys()
    if any(name.startswith("transformer.text_model.") for name in names):
        return {
            "heads": {"num_heads": 8},
            "cond_stage_config": {"target": _MODULES + "FrozenCLIPEmbedder", "params": {}},
            "parameterization": prediction or "eps",
            "image_size": 64,
        }
    if "model.positional_embedding" in names and linear_projections(file.unet):
        if prediction is None:
            raise InputError(
                "Stable Diffusion 2.x files do not contain the kind of prediction; give --prediction eps (the 512 px "
                "base models) or --prediction v (768 px), or --config."
            )
        return {
            "heads": {"num_head_channels": 64},
            "cond_stage_config": {
                "target": _MODULES + "FrozenOpenCLIPEmbedder",
                "params": {"layer": "penultimate"},
            },
            "parameterization": prediction,
            "image_size": 96 if prediction == "v" else 64,
        }
    if "transformer.token_emb.weight" in names and (unet["model_channels"], unet.get("context_dim")) == _LARGE_TEXT:
        depth = len([name for name in names if re.fullmatch(r"transformer\.attn_layers\.layers\.\d+\.1\.to_q.*", name)])
        params = {"n_embed": _LARGE_TEXT[1], "n_layer": depth}
        return {
            "heads": {"num_heads": 8},
            "cond_stage_config": {"target": _MODULES + "BERTEmbedder", "params": params},
            "parameterization": prediction or "eps",
            "image_size": 32,
        }
    raise InputError(
        "weights alone do not determine this model's attention heads, schedule and conditions; give its YAML "
        "file with --config."
    )
