"""A model folder with every part as small as it can be, for tests of files and of parts from outside."""

import copy
from pathlib import Path
from typing import Any

import torch

from ldmlab.build import build_latent_diffusion
from ldmlab.model_files import write_model_folder

SPEC: dict[str, Any] = {
    "kind": "latent_diffusion",
    "image_size": 16,
    "first_stage": {
        "_target_": "ldmlab.first_stages.kl.KLAutoencoder",
        "channels": 8,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "mid_attention": False,
        "latent_channels": 2,
        "norm_groups": 4,
    },
    "latent_scale": {"_target_": "ldmlab.diffusion.latent_space.LatentScale", "std": [1.3], "shift": [0.0]},
    "backbone": {
        "_target_": "ldmlab.backbones.unet.UNet",
        "in_channels": 2,
        "out_channels": 2,
        "model_channels": 32,
        "channel_mult": [1],
        "num_res_blocks": 1,
        "attention_downsampling": [],
        "heads": 4,
        "context_width": 16,
    },
    "conditioners": {
        "class_label": {"_target_": "ldmlab.conditioners.class_label.ClassEmbedder", "classes": 10, "width": 16}
    },
    "diffusion": {
        "_target_": "ldmlab.diffusion.latent_diffusion.LatentDiffusion",
        "prediction": {"_target_": "ldmlab.diffusion.parameterization.EpsPrediction"},
        "schedule": {"_target_": "ldmlab.diffusion.schedule.Schedule"},
    },
    "guidance_trained": True,
    "sampler": {"_target_": "ldmlab.samplers.ddim.Ddim", "eta": 0.0},
}


def spec_with(**parts: Any) -> dict[str, Any]:
    """A copy of the description with some entries exchanged."""
    return copy.deepcopy({**SPEC, **parts})


def write_tiny_model(folder: Path) -> Path:
    """A whole model folder with drawn weights."""
    torch.manual_seed(0)
    model = build_latent_diffusion(SPEC)
    parts = {
        "first_stage": model.first_stage.state_dict(),
        "denoiser": model.backbone.state_dict(),
        "conditioner": model.conditioners.state_dict(),
    }
    write_model_folder(folder, SPEC, parts)
    return folder
