"""diffusers: import of networks and pipelines (without diffusers), export compared with diffusers' own output.

Here a folder is read: a pipeline as a latent diffusion model, or a single module.
"""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.interop.diffusers import diffusers_texts as texts
from ldmlab.interop.diffusers import diffusers_unets
from ldmlab.interop.diffusers.diffusers_build import build_first_stage, build_text, build_unet, filled_text
from ldmlab.interop.diffusers.diffusers_config import read_json, read_weights
from ldmlab.interop.diffusers.diffusers_first_stages import DC, KL, VQ, arguments, kind_of
from ldmlab.interop.diffusers.diffusers_networks import CLASS_TABLE, as_official
from ldmlab.interop.diffusers.diffusers_schedulers import clips, diffusion_node, is_replaced, sampler_node, token_values
from ldmlab.interop.diffusers.diffusers_sd3 import SD3_PIPELINE, read_texts
from ldmlab.interop.diffusers.diffusers_solvers import other_steps
from ldmlab.interop.diffusers.diffusers_texts import BERT, CLIP
from ldmlab.interop.diffusers.diffusers_transformers import DIT, OLD, SD3, read_transformer
from ldmlab.interop.diffusers.diffusers_unets import CONDITION, PLAIN, TARGET
from ldmlab.interop.renaming import downsampling

__all__ = ["as_official", "build_first_stage", "build_text", "build_unet", "notes_of", "read_folder"]


Spec = dict[str, Any]
Parts = dict[str, dict[str, Tensor]]
_HOME, _DIFFUSION = "ldmlab.conditioners.", "ldmlab.diffusion."
_INPAINTING, _SUPER_RESOLUTION = "StableDiffusionInpaintPipeline", "LDMSuperResolutionPipeline"
_PIXELS = ("DDIMPipeline", "DDPMPipeline")
_DIT = "DiTPipeline"
_TRANSFORMERS = (_DIT, SD3_PIPELINE)
_PIPELINES = (
    *_TRANSFORMERS,
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", _INPAINTING),
    *("LDMTextToImagePipeline", "LDMPipeline", _SUPER_RESOLUTION, *_PIXELS),
)
_KINDS = {
    CONDITION: "unet",
    PLAIN: "unet",
    DIT: "transformer",
    OLD: "transformer",
    SD3: "transformer",
    KL: "first_stage",
    VQ: "first_stage",
    DC: "first_stage",
    CLIP: "text",
    BERT: "text",
}
_IGNORED = ("scheduler", "tokenizer", "safety_checker", "feature_extractor")  # or read with their module


def read_folder(path: Path | str) -> tuple[Spec, Parts]:
    """The content of `model.yaml` and the weights by part; a lone first stage is of kind first_stage."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return _read_pipeline(folder, read_json(folder / "model_index.json"))
    config = read_json(folder / "config.json")
    name = config.get("_class_name") or (config.get("architectures") or ["module without a class"])[0]
    if _KINDS.get(name) != "first_stage":
        supported = f"supported: {KL}, {VQ}, {DC} alone, or the folder of a whole pipeline (with model_index.json)"
        raise InputError(f"{folder} holds a {name} alone, which is not supported; {supported}.")
    stage = build_first_stage(config, read_weights(folder))
    size = _side(config.get("sample_size"), 1) or 256
    spec = {"kind": "first_stage", "image_size": size, "first_stage": arguments(config)}
    return spec, {"first_stage": stage.state_dict()}


def notes_of(spec: Spec) -> tuple[str, ...]:
    """What an import does not keep, for the user."""
    origin, notes = spec.get("origin", {}), list[str]()
    if (name := origin.get("scheduler")) is not None:
        notes += [f"the solver of {name} is replaced by ddim, what sampler=auto is; --sampler names another one"]
    if origin.get("other_steps"):
        notes += [
            "DDIMScheduler's steps (timestep_spacing, steps_offset, set_alpha_to_one) are not exactly those of ddim"
        ]
    if origin.get("clips"):
        notes += ["the scheduler clips every clean estimate (clip_sample), and samplers here do not"]
    return tuple(notes)


def _read_pipeline(folder: Path, index: Spec) -> tuple[Spec, Parts]:
    name = index.get("_class_name")
    if name not in _PIPELINES:
        raise InputError(f"{folder} is a {name}, which is not supported; supported: {', '.join(_PIPELINES)}.")
    found = _components(folder, index)
    stage_config: Spec = {"scaling_factor": 1.0}
    stage_node: Spec = {"_target_": "ldmlab.first_stages.identity.Identity"}
    parts: Parts = {}
    if "first_stage" in found:
        stage_config = read_json(found["first_stage"] / "config.json")
        stage_node = arguments(stage_config)
        parts["first_stage"] = build_first_stage(stage_config, read_weights(found["first_stage"])).state_dict()
    config = read_json(found["denoiser"] / "config.json")
    f = downsampling(stage_node)
    backbone, parts["denoiser"], rows = _read_denoiser(config, found["denoiser"], name)
    conditioners, parts["conditioner"] = _conditioners(folder, index, found.get("text"), backbone, rows)
    conditioners |= _extra_inputs(folder, name, backbone["in_channels"], stage_node.get("latent_channels", 3), f)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    side = _side(config.get("sample_size"), f) or _side(stage_config.get("sample_size"), 1) or 256
    origin = {"linear_projection": bool(config.get("use_linear_projection", False))}
    origin |= {"scheduler": scheduler["_class_name"]} if is_replaced(scheduler) else {}
    origin |= {"clips": True} if clips(scheduler) else {}
    origin |= {"other_steps": True} if other_steps(scheduler) else {}
    origin |= {"id2label": index["id2label"]} if index.get("id2label") else {}
    spec: Spec = {
        "kind": "latent_diffusion",
        "image_size": side,
        "first_stage": stage_node,
        "latent_scale": _scale_node(folder, name, stage_config),
        "backbone": backbone,
        "conditioners": conditioners,
        "diffusion": _learned_variance(diffusion_node(scheduler, token_values(backbone)), backbone),
        "guidance_trained": True if name in _TRANSFORMERS else None if conditioners else False,
        "sampler": sampler_node(scheduler),
        "origin": {"format": "diffusers", **origin},
    }
    return spec, {part: tensors for part, tensors in parts.items() if tensors}


def _conditioners(
    folder: Path, index: Spec, encoder: Path | None, backbone: Spec, rows: Tensor | None
) -> tuple[dict[str, Spec], dict[str, Tensor]]:
    """Nodes and weights of captions and classes; SD3's captions hold the pooled states that its backbone takes."""
    if index["_class_name"] == SD3_PIPELINE:
        backbone["pooled_width"] = backbone.pop("vector_width")
        node, tensors = read_texts(folder, index, backbone["context_width"])
        return {"text": node}, tensors
    nodes, tensors = _read_text(folder, encoder)
    if rows is not None:
        none = int(index["_class_name"] == _DIT)  # a row for "no class"
        options = {"classes": len(rows) - none, "width": rows.shape[1], "drop": 0.1 * none, "null_row": bool(none)}
        nodes["class_label"] = {"_target_": f"{_HOME}class_label.ClassEmbedder", "slot": "vector", **options}
        tensors["class_label.embedding.weight"] = rows.float()
    return nodes, tensors


def _read_denoiser(config: Spec, folder: Path, pipeline: str) -> tuple[Spec, dict[str, Tensor], Tensor | None]:
    """Our backbone's node and weights, and a table of classes inside the network."""
    weights = read_weights(folder)
    if pipeline in _TRANSFORMERS:
        return read_transformer(config, weights)
    rows = weights.get(CLASS_TABLE) if config.get("num_class_embeds") is not None else None
    return {"_target_": TARGET, **diffusers_unets.arguments(config)}, build_unet(config, weights).state_dict(), rows


def _learned_variance(node: Spec, backbone: Spec) -> Spec:
    """The diffusion node of a network whose output has a second half."""
    if backbone["out_channels"] != 2 * backbone["in_channels"]:
        return node
    prediction = {"_target_": f"{_DIFFUSION}parameterization.LearnedVariance", "mean": node["prediction"]}
    return node | {"prediction": prediction, "loss": {"_target_": f"{_DIFFUSION}diffusion_loss.VariationalLoss"}}


def _components(folder: Path, index: Spec) -> dict[str, Path]:
    """Folders of the denoiser, the first stage and the text encoder, whatever the pipeline calls them."""
    found = {}
    for name, value in index.items():
        if name.startswith("_") or name in _IGNORED or not isinstance(value, list) or value[1] is None:
            continue
        if index["_class_name"] == SD3_PIPELINE and name.startswith(("text_encoder", "tokenizer")):
            continue
        if value[1] not in _KINDS:
            raise InputError(
                f"{folder} has a {value[1]} ({name}), which is not supported; supported: {', '.join(_KINDS)}."
            )
        found[_KINDS[value[1]]] = folder / name
    denoiser = "transformer" if index["_class_name"] in _TRANSFORMERS else "unet"
    for part in (denoiser,) if index["_class_name"] in _PIXELS else (denoiser, "first_stage"):
        if part not in found:
            raise InputError(f"{folder / 'model_index.json'} names no {part}; give a whole pipeline's folder.")
    return found | {"denoiser": found[denoiser]}


def _extra_inputs(folder: Path, pipeline: str, channels: int, latent_channels: int, f: int) -> dict[str, Spec]:
    """Conditioners that give what the U-Net takes besides the noisy latent and the text, in their order."""
    extra: dict[str, Spec] = {}
    expected = latent_channels
    if pipeline == _SUPER_RESOLUTION:
        expected += 3
        extra["low_resolution"] = {"_target_": f"{_HOME}low_resolution.LowResolution", "drop": 0.0}
    elif pipeline == _INPAINTING:  # mask 0 or 1, then the latent of the image with grey holes
        expected += latent_channels + 1
        extra["mask"] = {"_target_": f"{_HOME}mask.Mask", "downsampling": f, "keep": 0.0, "hole": 1.0}
        extra["masked_latent"] = {"_target_": f"{_HOME}mask.MaskedLatent", "hole": 0.0}
    if channels != expected:
        raise InputError(
            f"{folder}: the U-Net of a {pipeline} takes {expected} channels, but this one {channels}; "
            "check _class_name in model_index.json."
        )
    return extra


def _read_text(folder: Path, encoder: Path | None) -> tuple[dict[str, Spec], dict[str, Tensor]]:
    """The text conditioner's node and weights, by the name it has in a model."""
    if encoder is None:
        return {}, {}
    config, tokenizer = read_json(encoder / "config.json"), folder / "tokenizer"
    if texts.kind_of(config) == CLIP:
        ours = texts.node(config, padding=texts.clip_padding(tokenizer), length=texts.clip_length(tokenizer))
    else:
        ours = texts.node(config, vocabulary=texts.bert_vocabulary(tokenizer))
    text = filled_text(ours, read_weights(encoder))
    return {"text": ours}, {f"text.{key}": tensor for key, tensor in text.state_dict().items()}


def _scale_node(folder: Path, pipeline: str, config: Spec) -> Spec:
    """raw = final / scaling_factor + shift_factor; the super-resolution pipeline never scales."""
    factor = config.get("scaling_factor")
    if pipeline == _SUPER_RESOLUTION:
        factor = 1.0
    elif factor is None and kind_of(config) == VQ:
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
