"""Small models of every kind that an export knows: description and weights, none of them zero."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.build import build_latent_diffusion

HOME = "ldmlab."
Spec = dict[str, Any]
Parts = dict[str, dict[str, Tensor]]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "app", "##le", "of", "many", "words", "one", "gr", "##u"]


def kl(levels: int = 4, **more: Any) -> Spec:
    return {
        "_target_": f"{HOME}first_stages.kl.KLAutoencoder",
        "channels": 32,
        "channel_mult": [1, 1, 2, 2][:levels],
        "num_res_blocks": 1,
        "latent_channels": 4,
        **more,
    }


def vq(levels: int = 3, **more: Any) -> Spec:
    node = kl(levels) | {"_target_": f"{HOME}first_stages.vq.VQModel", "latent_channels": 3, "codebook_size": 64}
    return node | more


def unet(channels: int, extra: int = 0, **more: Any) -> Spec:
    return {
        "_target_": f"{HOME}backbones.unet.UNet",
        "in_channels": channels + extra,
        "out_channels": channels,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_downsampling": [2],
        **({} if "head_channels" in more else {"heads": 2}),
        **more,
    }


def clip_text(width: int = 32, **more: Any) -> Spec:
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": 2, "layers": 2}
    config = {"embed_dim": width, "text_cfg": text, "quick_gelu": more.pop("quick_gelu", True)}
    return {"_target_": f"{HOME}conditioners.text.open_clip_text", "config": config, "drop": 0.1, **more}


def bert_text(folder: Path, width: int = 32) -> Spec:
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join([*VOCABULARY, ""]))
    options = {"width": width, "depth": 2, "vocab_size": len(VOCABULARY), "vocab": str(vocabulary)}
    return {"_target_": f"{HOME}conditioners.text.TransformerText", **options}


def class_label(slot: str = "tokens", width: int = 32) -> Spec:
    options = {"classes": 5, "width": width, "slot": slot}
    return {"_target_": f"{HOME}conditioners.class_label.ClassEmbedder", **options}


def spatial(name: str, kind: str, **options: Any) -> Spec:
    return {"_target_": f"{HOME}conditioners.{name}.{kind}", **options}


def describe(
    first_stage: Spec,
    backbone: Spec,
    conditioners: dict[str, Spec] | None = None,
    *,
    image_size: int = 64,
    std: Any = 1.0,
    shift: Any = 0.0,
    prediction: str = "EpsPrediction",
    schedule: Spec | None = None,
) -> Spec:
    ends = {"name": "scaled_linear", "start": 0.00085, "end": 0.012}
    return {
        "kind": "latent_diffusion",
        "image_size": image_size,
        "first_stage": first_stage,
        "latent_scale": {"_target_": f"{HOME}diffusion.latent_space.LatentScale", "std": std, "shift": shift},
        "backbone": backbone,
        "conditioners": conditioners or {},
        "diffusion": {
            "_target_": f"{HOME}diffusion.latent_diffusion.LatentDiffusion",
            "prediction": {"_target_": f"{HOME}diffusion.parameterization.{prediction}"},
            "schedule": {"_target_": f"{HOME}diffusion.schedule.Schedule", **(schedule or ends)},
        },
        "guidance_trained": bool(conditioners),
        "sampler": {"_target_": f"{HOME}samplers.ddim.Ddim", "eta": 0.0},
    }


def model(name: str, folder: Path) -> Spec:
    """sd1 | sd2 | unconditional | ldm_text | super_resolution | inpainting | ..., by the names in MODELS."""
    mask = {"mask": spatial("mask", "Mask", downsampling=8, keep=0.0, hole=1.0)}
    masked = {"masked_latent": spatial("mask", "MaskedLatent", hole=0.0)}
    made = {
        "sd1": lambda: describe(
            kl(), unet(4, context_width=32), {"text": clip_text(padding="end")}, std=1 / 0.18215
        ),
        "sd2": lambda: describe(
            kl(),
            unet(4, context_width=32, head_channels=16, transformer_depth=2),
            {"text": clip_text(layer="penultimate", quick_gelu=False)},
            std=1 / 0.18215,
            prediction="VPrediction",
        ),
        "unconditional": lambda: describe(
            vq(), unet(3, head_channels=32, attention_downsampling=[1, 2]), image_size=32
        ),
        "unconditional_kl_per_channel": lambda: describe(
            kl(3), unet(4, head_channels=16), std=[1.5, 0.5, 2.0, 1.0], shift=[0.1, -0.2, 0.3, 0.0]
        ),
        "pixels": lambda: describe(
            {"_target_": f"{HOME}first_stages.identity.Identity"}, unet(3, head_channels=32), image_size=16
        ),
        "churches_like": lambda: describe(
            kl(),
            unet(4, head_channels=32, residual_resampling=True, scale_shift=True, attention_downsampling=[1]),
            std=3.0,
        ),
        "ldm_text": lambda: describe(
            kl(), unet(4, context_width=32), {"text": bert_text(folder)}, std=1 / 0.18215
        ),
        "super_resolution": lambda: describe(
            vq(), unet(3, 3, head_channels=16), {"low": spatial("low_resolution", "LowResolution")}, std=2.0
        ),
        "inpainting": lambda: describe(
            kl(), unet(4, 5, context_width=32), {"text": clip_text(), **mask, **masked}, std=1 / 0.18215
        ),
        "class_tokens": lambda: describe(vq(), unet(3, context_width=32), {"label": class_label()}),
        "class_vector": lambda: describe(
            vq(), unet(3, head_channels=32, vector_width=24), {"label": class_label("vector", 24)}
        ),
        "flow": lambda: describe(
            kl(3), unet(4, head_channels=16), prediction="VelocityPrediction",
            schedule={"_target_": f"{HOME}diffusion.paths.LinearPath", "shift": 3.0},
        ),
        "flow_match": lambda: describe(
            kl(3), unet(4, head_channels=16), prediction="VelocityPrediction",
            schedule={"_target_": f"{HOME}diffusion.flow_match.FlowMatchPath", "dynamic": [1024, 0.5, 16384, 1.15],
                      "terminal": 0.05, "rule": "karras"},
        ),
        "cosine": lambda: describe(vq(), unet(3, head_channels=32), schedule={"name": "cosine"}),
        "sqrt": lambda: describe(
            vq(), unet(3, head_channels=32), schedule={"name": "sqrt", "start": 1e-6, "end": 4e-4}
        ),
    }  # fmt: skip
    return made[name]()


PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "inpainting": "StableDiffusionInpaintPipeline",
    "unconditional": "LDMPipeline",
    "unconditional_kl_per_channel": "LDMPipeline",
    "churches_like": "LDMPipeline",
    "cosine": "LDMPipeline",
    "sqrt": "LDMPipeline",
    "pixels": "DDIMPipeline",
    "ldm_text": "LDMTextToImagePipeline",
    "super_resolution": "LDMSuperResolutionPipeline",
}
MODULES = ("class_tokens", "class_vector", "flow", "flow_match")


def weights(spec: Spec, seed: int = 0) -> Parts:
    """Random weights of a size at which images stay within bounds and every layer matters."""
    torch.manual_seed(seed)
    built = build_latent_diffusion(spec)
    for parameter in built.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    modules = {"first_stage": built.first_stage, "denoiser": built.backbone, "conditioner": built.conditioners}
    return {name: module.state_dict() for name, module in modules.items() if module.state_dict()}
