"""Official configurations read off the shapes of official weights, for files that come without one.

Keys carry no prefix. Shapes tell all of a first stage and, of a U-Net, all but how its attention splits into heads.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError

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
        raise InputError(f"{key} is missing, so the network cannot be told from its shapes; give --config.")
    return state[key].shape[0]


def _multiples(widths: list[int], base: int, part: str) -> list[int]:
    if any(width % base for width in widths):
        raise InputError(f"the {part}'s widths {widths} are no multiples of {base}; give --config.")
    return [width // base for width in widths]
