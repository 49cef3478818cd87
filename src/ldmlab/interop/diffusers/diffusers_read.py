"""A diffusers folder, read without diffusers: a pipeline as a latent diffusion model, or a single module."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.diffusers import diffusers_first_stages, diffusers_texts, diffusers_unets
from ldmlab.interop.diffusers.diffusers_build import CLASS_TABLE, build_first_stage, build_unet, filled_text
from ldmlab.interop.diffusers.diffusers_config import diffusion_node, read_json, read_weights, sampler_node
from ldmlab.interop.diffusers.diffusers_texts import bert_vocabulary, clip_length, clip_padding

Spec = dict[str, Any]
Parts = dict[str, dict[str, Tensor]]
_HOME = diffusers_texts.HOME


@dataclass(frozen=True)
class Pipeline:
    """Inputs of a pipeline's U-Net besides the noisy latent and the text."""

    extra_channels: Callable[[int], int]  # latent channels => channels concatenated to them
    conditioners: Callable[[int], dict[str, Spec]]  # downsampling factor => nodes that give them, in this order


def _low_resolution(f: int) -> dict[str, Spec]:
    return {"low_resolution": {"_target_": f"{_HOME}low_resolution.LowResolution", "drop": 0.0}}


def _inpainting(f: int) -> dict[str, Spec]:
    """Stable Diffusion's order and numbers: mask 0 or 1, then the latent of the image with grey holes."""
    mask = {"_target_": f"{_HOME}mask.Mask", "downsampling": f, "keep": 0.0, "hole": 1.0}
    return {"mask": mask, "masked_latent": {"_target_": f"{_HOME}mask.MaskedLatent", "hole": 0.0}}


_PLAIN = Pipeline(lambda channels: 0, lambda f: {})
PIPELINES = {
    "StableDiffusionPipeline": _PLAIN,
    "StableDiffusionImg2ImgPipeline": _PLAIN,
    "StableDiffusionInpaintPipeline": Pipeline(lambda channels: channels + 1, _inpainting),
    "LDMTextToImagePipeline": _PLAIN,
    "LDMPipeline": _PLAIN,
    "LDMSuperResolutionPipeline": Pipeline(lambda channels: 3, _low_resolution),
    "DDIMPipeline": _PLAIN,
    "DDPMPipeline": _PLAIN,
}
_ALONE = (diffusers_first_stages.KL, diffusers_first_stages.VQ)
_IGNORED = ("scheduler", "tokenizer", "safety_checker", "feature_extractor")  # or read with their module


def read_folder(path: Path | str) -> tuple[Spec, Parts]:
    """The content of `model.yaml` and the weights by part; a lone AutoencoderKL or VQModel is of kind first_stage."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return _read_pipeline(folder, read_json(folder / "model_index.json"))
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or ["module without a class"])[0]
    if name not in _ALONE:
        supported = f"supported: {', '.join(_ALONE)} alone, or the folder of a whole pipeline (with model_index.json)"
        raise InputError(f"{folder} holds a {name} alone, which is not supported; {supported}.")
    node = diffusers_first_stages.arguments(config)
    stage = build_first_stage(config, read_weights(folder))
    spec = {"kind": "first_stage", "image_size": _side(config.get("sample_size"), 1) or 256, "first_stage": node}
    return spec, {"first_stage": stage.state_dict()}


def _read_pipeline(folder: Path, index: Spec) -> tuple[Spec, Parts]:
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise InputError(f"{folder} is a {name}, which is not supported; supported: {', '.join(PIPELINES)}.")
    found = _components(folder, index)
    stage_config, stage_node, stage_weights = _read_first_stage(found.get("first_stage"))
    unet_config = read_json(found["unet"] / "config.json")
    unet_weights = read_weights(found["unet"])
    unet = build_unet(unet_config, unet_weights)
    f = 2 ** (len(stage_node.get("channel_mult", [1])) - 1)
    _check_channels(folder, name, unet.in_channels, stage_node.get("latent_channels", 3))
    conditioners, weights = _read_text(folder, found.get("text"))
    if CLASS_TABLE in unet_weights and unet_config.get("num_class_embeds") is not None:
        rows, width = unet_weights[CLASS_TABLE].shape
        target = f"{_HOME}class_label.ClassEmbedder"
        options = {"classes": rows, "width": width, "slot": "vector", "drop": 0.0, "null_row": False}
        conditioners["class_label"] = {"_target_": target, **options}
        weights["class_label.embedding.weight"] = unet_weights[CLASS_TABLE].float()
    conditioners |= PIPELINES[name].conditioners(f)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    side = _side(unet_config.get("sample_size"), f) or _side(stage_config.get("sample_size"), 1) or 256
    spec = {
        "kind": "latent_diffusion",
        "image_size": side,
        "first_stage": stage_node,
        "latent_scale": _scale_node(folder, name, stage_config),
        "backbone": {"_target_": "ldmlab.backbones.unet.UNet", **diffusers_unets.arguments(unet_config)},
        "conditioners": conditioners,
        "diffusion": diffusion_node(scheduler),
        "guidance_trained": None if conditioners else False,
        "sampler": sampler_node(scheduler),
        "origin": {"format": "diffusers", "linear_projection": bool(unet_config.get("use_linear_projection", False))},
    }
    parts = {"first_stage": stage_weights, "denoiser": unet.state_dict(), "conditioner": weights}
    return spec, {part: tensors for part, tensors in parts.items() if tensors}


def _read_first_stage(folder: Path | None) -> tuple[Spec, Spec, dict[str, Tensor]]:
    """Its configuration, our node and our tensors; pixels where the pipeline has none."""
    if folder is None:
        return {"scaling_factor": 1.0}, {"_target_": "ldmlab.first_stages.identity.Identity"}, {}
    config = read_json(folder / "config.json")
    return (
        config,
        diffusers_first_stages.arguments(config),
        build_first_stage(config, read_weights(folder)).state_dict(),
    )


def _components(folder: Path, index: Spec) -> dict[str, Path]:
    """Folders of the U-Net, the first stage and the text encoder, whatever the pipeline calls them."""
    kinds = {
        diffusers_unets.CONDITION: "unet",
        diffusers_unets.PLAIN: "unet",
        diffusers_first_stages.KL: "first_stage",
        diffusers_first_stages.VQ: "first_stage",
    }
    kinds |= {diffusers_texts.CLIP: "text", diffusers_texts.BERT: "text"}
    found = {}
    for name, value in index.items():
        if name.startswith("_") or name in _IGNORED or not isinstance(value, list) or value[1] is None:
            continue
        if value[1] not in kinds:
            raise InputError(
                f"{folder} has a {value[1]} ({name}), which is not supported; supported: {', '.join(kinds)}."
            )
        found[kinds[value[1]]] = folder / name
    pixels = index["_class_name"] in ("DDIMPipeline", "DDPMPipeline")
    for part in ("unet",) if pixels else ("unet", "first_stage"):
        if part not in found:
            raise InputError(f"{folder / 'model_index.json'} names no {part}; give a whole pipeline's folder.")
    return found


def _check_channels(folder: Path, pipeline: str, channels: int, latent_channels: int) -> None:
    expected = latent_channels + PIPELINES[pipeline].extra_channels(latent_channels)
    if channels != expected:
        raise InputError(
            f"{folder}: the U-Net of a {pipeline} takes {expected} channels, but this one {channels}; "
            "check _class_name in model_index.json."
        )


def _read_text(folder: Path, encoder: Path | None) -> tuple[dict[str, Spec], dict[str, Tensor]]:
    """The text conditioner's node and weights, by the name it has in a model."""
    if encoder is None:
        return {}, {}
    config = read_json(encoder / "config.json")
    tokenizer = folder / "tokenizer"
    if diffusers_texts.kind_of(config) == diffusers_texts.CLIP:
        node = diffusers_texts.node(config, padding=clip_padding(tokenizer), length=clip_length(tokenizer))
    else:
        node = diffusers_texts.node(config, vocabulary=bert_vocabulary(tokenizer))
    text = filled_text(node, config, read_weights(encoder))
    return {"text": node}, {f"text.{key}": tensor for key, tensor in text.state_dict().items()}


def _scale_node(folder: Path, pipeline: str, config: Spec) -> Spec:
    """raw = final / scaling_factor + shift_factor; the super-resolution pipeline never scales."""
    factor = config.get("scaling_factor")
    if pipeline == "LDMSuperResolutionPipeline":
        factor = 1.0
    elif factor is None and diffusers_first_stages.kind_of(config) == diffusers_first_stages.VQ:
        warnings.warn(
            f"{folder}: its VQModel has no scaling_factor; taken as 1, as in the paper's models.", stacklevel=2
        )
        factor = 1.0
    std, shift = 1.0 / (0.18215 if factor is None else factor), config.get("shift_factor") or 0.0
    return {"_target_": "ldmlab.diffusion.latent_space.LatentScale", "std": [std], "shift": [shift]}


def _side(size: Any, factor: int) -> int | list[int] | None:
    """An image's side, or height and width, in pixels."""
    if isinstance(size, list | tuple):
        return int(size[0]) * factor if len(set(size)) == 1 else [int(side) * factor for side in size]
    return None if size is None else int(size) * factor
