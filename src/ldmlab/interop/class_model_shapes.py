"""Arguments of the official DiT, SiT, LightningDiT and EDM2 classes, from the names and shapes of their tensors."""

import re
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.renaming import State

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}  # of the published widths
Config = dict[str, Any]


def transformer_config(state: State, program: str) -> Config:
    """Those of `DiT`, `SiT` or `LightningDiT`; `num_heads` only where the width is a published one."""
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight", program)
    rows, places = _shape(state, "final_layer.linear.weight", program)[0], _shape(state, "pos_embed", program)[1]
    mlp = "blocks.0.mlp.fc1.weight" if "blocks.0.mlp.fc1.weight" in state else "blocks.0.mlp.w12.weight"
    config = {
        **{"input_size": round(places**0.5) * patch, "patch_size": patch, "in_channels": channels},
        **{"hidden_size": width, "depth": 1 + max(_numbers(state, r"blocks\.(\d+)\."), default=0)},
        **({"num_heads": _HEADS[width]} if width in _HEADS else {}),
        "num_classes": _shape(state, "y_embedder.embedding_table.weight", program)[0] - 1,
        "learn_sigma": rows == 2 * channels * patch**2,
    }
    if program != "lightningdit":
        return config | {"mlp_ratio": _shape(state, mlp, program)[0] / width}
    return config | {
        **{"use_swiglu": mlp.endswith("w12.weight"), "use_rmsnorm": "blocks.0.norm1.weight" in state},
        **{"use_qknorm": "blocks.0.attn.q_norm.weight" in state, "use_rope": "feat_rope.freqs_cos" in state},
        "wo_shift": _shape(state, "blocks.0.adaLN_modulation.1.weight", program)[0] == 4 * width,
    }


def edm2_config(state: State) -> Config:
    """Those of EDM2's `Precond`, its balances and the width of heads at their defaults."""
    sides = sorted(set(_numbers(state, r"unet\.enc\.(\d+)x")), reverse=True)
    if not sides:
        _shape(state, "unet.enc", "edm2")
    first, *_ = sides
    widths = [_shape(state, f"unet.enc.{side}x{side}_block0.conv_res0.weight", "edm2")[0] for side in sides]
    embedding, noise = _shape(state, "unet.emb_noise.weight", "edm2")
    return {
        "img_resolution": first,
        "img_channels": _shape(state, f"unet.enc.{first}x{first}_conv.weight", "edm2")[1] - 1,
        **{"model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths]},
        **{"channel_mult_noise": noise // widths[0], "channel_mult_emb": embedding // widths[0]},
        "num_blocks": 1 + max(_numbers(state, rf"unet\.enc\.{first}x{first}_block(\d+)\.")),
        "attn_resolutions": [s for s in sides if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in state],
        "label_dim": _shape(state, "unet.emb_label.weight", "edm2")[1],
        "logvar_channels": _shape(state, "logvar_linear.weight", "edm2")[1],
    }


def _numbers(state: State, pattern: str) -> list[int]:
    return [int(match[1]) for name in state if (match := re.match(pattern, name))]


def _shape(state: State, name: str, program: str) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"the file has no tensor {name}, so it is no class-conditional {program}; give its format.")
    return tuple(state[name].shape)
