"""The networks of published pipelines, at their real size and without memory: the same tensors on both sides."""

from typing import Any

import pytest
import torch
import yaml

from ldmlab.app.conf_files import conf_dir
from ldmlab.interop.diffusers import diffusers_first_stages, diffusers_unets
from ldmlab.interop.diffusers.diffusers_networks import first_stage_part, unet_part
from ldmlab.interop.diffusers.diffusers_unets import configuration

peer = pytest.importorskip("diffusers")

UNETS: dict[str, tuple[str, dict[str, Any], float]] = {  # class, configuration, millions of parameters
    "Stable Diffusion 1.x": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768}, 859.52),
    "Stable Diffusion 1.x inpainting": (
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "in_channels": 9},
        859.54,
    ),
    "Stable Diffusion 2.x": (
        "UNet2DConditionModel",
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
        },
        865.91,
    ),
    "LDM text-to-image, 1.45 billion": (
        "UNet2DConditionModel",
        {"sample_size": 32, "cross_attention_dim": 1280},
        872.30,
    ),
    "LDM CelebA-HQ": (
        "UNet2DModel",
        {"sample_size": 64, "attention_head_dim": 32, "block_out_channels": [224, 448, 672, 896]},
        274.06,
    ),
    "LDM super-resolution": (
        "UNet2DModel",
        {
            "sample_size": 64,
            "in_channels": 6,
            "attention_head_dim": 32,
            "block_out_channels": [160, 320, 320, 640],
            "down_block_types": ["DownBlock2D"] * 3 + ["AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * 3,
        },
        113.62,
    ),
}


def levels(widths: list[int], attention: int = 0) -> dict[str, Any]:
    """Options of an autoencoder with these widths and attention in the last levels."""
    marks = [""] * (len(widths) - attention) + ["Attn"] * attention
    return {
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": [f"{mark}DownEncoderBlock2D" for mark in marks],
        "up_block_types": [f"{mark}UpDecoderBlock2D" for mark in reversed(marks)],
    }


def deep(levels: int, channels: int, blocks: int = 2, **changed: Any) -> tuple[str, dict[str, Any]]:
    """A DC-AE of ImageNet, or with changes another one."""
    found: dict[str, Any] = {"latent_channels": channels}
    for side, first in (("encoder", [0, 4, 8]), ("decoder", [0, 5, 10])):
        found |= {
            f"{side}_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * (levels - 3),
            f"{side}_block_out_channels": [128, 256, 512, 512, 1024, 1024, 2048, 2048][:levels],
            f"{side}_layers_per_block": first + [blocks] * (levels - 3),
            f"{side}_qkv_multiscales": [[]] * levels,
        }
    norms, acts = (3 * [fine] + (levels - 3) * [rest] for fine, rest in (("batch_norm", "rms_norm"), ("relu", "silu")))
    return "AutoencoderDC", {**found, "decoder_norm_types": norms, "decoder_act_fns": acts, **changed}


SANA = {
    **{"encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3] * 6},
    **{f"{side}_qkv_multiscales": [[], [], [], [5], [5], [5]] for side in ("encoder", "decoder")},
    **{"downsample_block_type": "Conv", "upsample_block_type": "interpolate", "decoder_act_fns": "silu"},
}
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl-f8": ("AutoencoderKL", {**levels([128, 256, 512, 512]), "latent_channels": 4}),
    "kl-f16": ("AutoencoderKL", {**levels([128, 128, 256, 256, 512], 1), "latent_channels": 16}),
    "vq-f4": ("VQModel", {**levels([128, 256, 512]), "latent_channels": 3, "num_vq_embeddings": 8192}),
    "vq-f4-noattn": (
        "VQModel",
        {**levels([128, 256, 512]), "num_vq_embeddings": 8192, "mid_block_add_attention": False},
    ),
    "vq-f8": ("VQModel", {**levels([128, 128, 256, 512], 1), "latent_channels": 4, "num_vq_embeddings": 16384}),
    "dc-ae-f32c32-in-1.0": deep(6, 32),
    "dc-ae-f64c128-in-1.0": deep(7, 128),
    "dc-ae-f128c512-in-1.0": deep(8, 512),
    "dc-ae-f32c32-sana-1.0": deep(6, 32, **SANA, decoder_norm_types="rms_norm"),
}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    kind, config, millions = UNETS[name]
    with torch.device("meta"):
        theirs = getattr(peer, kind)(**config)
    arguments = diffusers_unets.arguments(dict(theirs.config))
    linear = bool(config.get("use_linear_projection"))
    part = unet_part({"_target_": diffusers_unets.TARGET, **arguments}, kind, linear_projection=linear)
    assert shapes(part.expected) == shapes(theirs.state_dict())
    assert round(sum(p.numel() for p in part.module.parameters()) / 1e6, 2) == millions
    back_kind, back = configuration(arguments, sample_size=config["sample_size"], linear_projection=linear)
    assert back_kind == kind
    with torch.device("meta"):
        again = getattr(peer, kind)(**back)
    assert shapes(again.state_dict()) == shapes(theirs.state_dict())


@pytest.mark.parametrize("name", STAGES)
def test_first_stage(name: str) -> None:
    kind, config = STAGES[name]
    with torch.device("meta"):
        theirs = getattr(peer, kind)(**config)
    node = diffusers_first_stages.arguments(dict(theirs.config))
    if name.startswith("dc-ae") and (file := conf_dir() / f"first_stage/{name[:-7].replace('-', '_')}.yaml").exists():
        assert node | {"shortcut": True, "initialisation": "torch"} == yaml.safe_load(file.read_text())
    assert shapes(first_stage_part(node, kind).expected) == shapes(theirs.state_dict())
    back_kind, back = diffusers_first_stages.configuration(node, image_size=256, scaling_factor=1.0)
    with torch.device("meta"):
        again = getattr(peer, back_kind)(**back)
    assert shapes(again.state_dict()) == shapes(theirs.state_dict())
