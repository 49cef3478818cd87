"""Arguments of the official DiT, SiT, LightningDiT, EDM and EDM2 classes, from names and shapes of tensors."""

import re
from typing import Any

from ldmlab.errors import InputError
from ldmlab.interop.renaming import Node, State

_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}  # of the published widths
Config = dict[str, Any]


def transformer_config(state: State, given: Node) -> Config:
    """Those of `DiT` and `SiT`; `num_heads` only where the width is a published one. `given`: those a user gave."""
    width, channels, patch, _ = _shape(state, "x_embedder.proj.weight")
    rows, places = _shape(state, "final_layer.linear.weight")[0], _shape(state, "pos_embed")[1]
    null_row = given.get("class_dropout_prob", 0.1) > 0
    return {
        **{"input_size": round(places**0.5) * patch, "patch_size": patch, "in_channels": channels},
        **{"hidden_size": width, "depth": 1 + max(_numbers(state, r"blocks\.(\d+)\."), default=0)},
        **({"num_heads": _HEADS[width]} if width in _HEADS else {}),
        "num_classes": _shape(state, "y_embedder.embedding_table.weight")[0] - null_row,
        "learn_sigma": rows == 2 * channels * patch**2,
        "mlp_ratio": _mlp_ratio(state, width),
    }


def repa_config(state: State, given: Node) -> Config:
    """Those of REPA's `SiT`; the projectors' block does not follow from shapes."""
    config = transformer_config(state, given)
    del config["learn_sigma"]
    projectors = 1 + max(_numbers(state, r"projectors\.(\d+)\."), default=-1)
    return config | {
        "encoder_depth": min(8, config["depth"]),
        "z_dims": [_shape(state, f"projectors.{i}.4.weight")[0] for i in range(projectors)],
        **({"projector_dim": _shape(state, "projectors.0.0.weight")[0]} if projectors else {}),
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }


def lightningdit_config(state: State, given: Node) -> Config:
    """Those of `LightningDiT`."""
    config = transformer_config(state, given)
    return config | {
        **{"use_swiglu": "blocks.0.mlp.w12.weight" in state, "use_rmsnorm": "blocks.0.norm1.weight" in state},
        **{"use_qknorm": "blocks.0.attn.q_norm.weight" in state, "use_rope": "feat_rope.freqs_cos" in state},
        "wo_shift": _shape(state, "blocks.0.adaLN_modulation.1.weight")[0] == 4 * config["hidden_size"],
    }


def _mlp_ratio(state: State, width: int) -> float:
    """A ratio that gives the MLP's width; gated MLPs are 2 / 3 as wide. Published ones have 4."""
    gated = "blocks.0.mlp.w12.weight" in state
    hidden = _shape(state, f"blocks.0.mlp.{'w12' if gated else 'fc1'}.weight")[0]
    if hidden == (2 * int(2 / 3 * 4 * width) if gated else 4 * width):
        return 4.0
    return ((-(-3 * hidden // 4) if gated else hidden) + 0.5) / width  # its product with the width is rounded down


def edm2_config(state: State, given: Node) -> Config:
    """Those of EDM2's `Precond`, its balances and the width of heads at their defaults."""
    sides = sorted(set(_numbers(state, r"unet\.enc\.(\d+)x")), reverse=True)
    if not sides:
        _shape(state, "unet.enc")
    first, *_ = sides
    widths = [_shape(state, f"unet.enc.{side}x{side}_block0.conv_res0.weight")[0] for side in sides]
    embedding, noise = _shape(state, "unet.emb_noise.weight")
    return {
        "img_resolution": first,
        "img_channels": _shape(state, f"unet.enc.{first}x{first}_conv.weight")[1] - 1,
        **{"model_channels": widths[0], "channel_mult": [width // widths[0] for width in widths]},
        **{"channel_mult_noise": noise // widths[0], "channel_mult_emb": embedding // widths[0]},
        "num_blocks": 1 + max(_numbers(state, rf"unet\.enc\.{first}x{first}_block(\d+)\.")),
        "attn_resolutions": [s for s in sides if f"unet.enc.{s}x{s}_block0.attn_qkv.weight" in state],
        "label_dim": _shape(state, "unet.emb_label.weight")[1],
        "logvar_channels": _shape(state, "logvar_linear.weight")[1],
    }


def edm_config(state: State, given: Node) -> Config:
    """Those of EDM's classes; augmentation labels serve training alone, so the network is read without them."""
    sides = sorted(set(_numbers(state, r"model\.enc\.(\d+)x")), reverse=True)
    if not sides:
        _shape(state, "model.enc")
    first, song = sides[0], "model.out_norm.weight" not in state
    widths = [_shape(state, f"model.enc.{side}x{side}_block0.conv0.weight")[0] for side in sides]
    base, channels = _shape(state, f"model.enc.{first}x{first}_conv.weight")[:2]
    embedding, noise = _shape(state, "model.map_layer0.weight")
    width = base if song else noise  # ADM's first convolution is as wide as the first level
    rows = _shape(state, f"model.dec.{first}x{first}_aux_conv.weight" if song else "model.out_conv.weight")[0]
    joined = [kind for kind in ("residual", "skip") if any(name.endswith(f"_aux_{kind}.weight") for name in state)]
    filters = [tensor[0, 0].float().sum(0) for name, tensor in state.items() if name.endswith("resample_filter")]
    return {
        **{"precond": "iDDPMPrecond" if rows == 2 * channels else "EDMPrecond"},
        **{"model_type": "SongUNet" if song else "DhariwalUNet", "img_resolution": first, "img_channels": channels},
        **{"model_channels": width, "channel_mult": [each // width for each in widths]},
        **{"channel_mult_emb": embedding // width, "channel_mult_noise": noise // width if song else 1},
        "num_blocks": 1 + max(_numbers(state, rf"model\.enc\.{first}x{first}_block(\d+)\.")),
        "attn_resolutions": [s for s in sides if f"model.enc.{s}x{s}_block0.qkv.weight" in state],
        "label_dim": state["model.map_label.weight"].shape[1] if "model.map_label.weight" in state else 0,
        "embedding_type": "fourier" if "model.map_noise.freqs" in state else "positional",
        **{"encoder_type": joined[0] if joined else "standard"},
        "decoder_type": "skip" if len(_numbers(state, r"model\.dec\.(\d+)x\d+_aux_norm\.w")) > 1 else "standard",
        **({"resample_filter": (filters[0] / filters[0][0]).tolist()} if filters else {}),
    }


def _numbers(state: State, pattern: str) -> list[int]:
    return [int(match[1]) for name in state if (match := re.match(pattern, name))]


def _shape(state: State, name: str) -> tuple[int, ...]:
    if name not in state:
        raise InputError(f"the file has no tensor {name}, so it is no network of this --format; give its own.")
    return tuple(state[name].shape)
