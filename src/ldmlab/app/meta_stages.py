"""Stages on the meta device and a batch for each, from configuration alone, as `plans.py` builds them from data."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from ldmlab.app.alignment_plan import alignment_of, first_stage_with_encoder
from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.plans import (
    check_divides,
    check_size_step,
    check_smallest,
    check_stage_options,
    latent_spec,
    sized_backbone,
    task_node,
)
from ldmlab.app.teacher import taught
from ldmlab.app.wiring import stage_options
from ldmlab.data.loaders import collate
from ldmlab.data.order import image_random
from ldmlab.diffusion.alignment import Alignment
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.errors import InputError, did_you_mean
from ldmlab.evaluation.flops import IMAGES
from ldmlab.instantiate import instantiate
from ldmlab.nn.lpips import LPIPS
from ldmlab.nn.openclip import check_source
from ldmlab.stored_names import ENCODER_PREFIX, STATES_PREFIX
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Stage

Config = Mapping[str, Any]
Parts = dict[str, nn.Module]
Made = tuple[Stage, Parts, dict[str, Any]]  # the stage, its modules by name on the meta device, a batch on the host


def build(config: Config, settings: TrainerSettings) -> Made:
    """The stage of a configuration; InputError where it has no step of its own."""
    kind = config["stage"]["name"]
    if kind not in _STAGES:
        raise InputError(f"stage={kind} has no step of its own; plan one of {', '.join(_STAGES)}.")
    return _STAGES[kind](taught(config), stage_options(config, settings))


def _autoencoder(config: Config, options: dict[str, Any]) -> Made:
    from ldmlab.training.autoencoder_module import AutoencoderStage

    check_stage_options(AutoencoderStage, config)
    size = config["data"]["image_size"]
    with torch.device("meta"):
        untrained = {name: _untrained(node) for name, node in (config.get("encoder") or {}).items()}
        first_stage, _, alignment = first_stage_with_encoder({**config, "encoder": untrained}, trained=False)
        lpips: dict[str, Any] = {"lpips": LPIPS(None)} if config["loss"].get("lpips_weight") else {}
        loss = instantiate(config["loss"], where="loss", **lpips, **alignment)
    check_divides(size, first_stage.downsampling)
    check_smallest(loss, size)
    stage = AutoencoderStage(first_stage=first_stage, loss=loss, **options)
    stage.codebook = None  # counts codes, which have no values
    if (regularisers := getattr(loss, "regularisers", None)) is not None:  # the largest step: images keep their size
        regularisers.equivariance = regularisers.low_resolution = 0.0
    parts: Parts = {"first stage": first_stage}
    if loss.adversary is not None:
        parts["discriminator"] = loss.adversary
    if getattr(loss, "lpips", None) is not None:
        parts["LPIPS"] = loss.lpips
    if alignment:
        parts |= {"projection": loss.alignment.projection, "frozen encoder": loss.alignment.encoder}
    return stage, parts, _batch({"image": np.zeros((3, size, size), np.uint8)})


def _clip(config: Config, options: dict[str, Any]) -> Made:
    from ldmlab.training.clip_module import ClipStage

    check_stage_options(ClipStage, config)
    size = config["data"]["image_size"]
    with torch.device("meta"):
        model = instantiate(_untrained(config["clip"]), where="clip", image_size=size)
    batch = _batch({"image": np.zeros((3, size, size), np.uint8), "caption": "a caption"})
    return ClipStage(model=model, **options), {"CLIP": model.model}, batch


def _diffusion(config: Config, options: dict[str, Any]) -> Made:
    from ldmlab.training.diffusion_module import DiffusionStage

    check_stage_options(DiffusionStage, config)
    size = config["data"]["image_size"]
    task = instantiate(task_node(config, size), where="task") if config["task"] else None
    first_stage, sample = _latents(config, task)
    latent = latent_spec(first_stage, size)
    given = {name: _untrained(node) for name, node in config["conditioner"].items()}
    with torch.device("meta"):
        conditioners, _ = build_conditioners(given, latent)
        node = sized_backbone(config["backbone"], latent, conditioners, config["diffusion"])
        backbone = instantiate(node, where="backbone")
    for conditioner in conditioners.values():
        if hasattr(getattr(conditioner, "tokenizer", None), "path"):  # of a vocabulary that may not be here
            conditioner.tokenizer = _NoVocabulary(conditioner.tokenizer.length)
    reads = frozenset().union(*(conditioner.reads for conditioner in conditioners.values()))
    sample |= _stored(reads, size) if task is None else task.give(_stored(task.stored, size), image_random(0, 0, ""))
    built = {"first_stage": first_stage, "latent_scale": LatentScale(), "backbone": backbone}
    model = instantiate(config["diffusion"], where="diffusion", conditioners=conditioners, task=task, **built)
    check_size_step(size, model.size_step)
    if tables := getattr(model.objective.loss, "tables", None):
        tables(model.path, torch.device("cpu"))  # by their values, which a step without values has not
    with torch.device("meta"):
        given = {name: _untrained(node) for name, node in (config["encoder"] or {}).items()}
        alignment = alignment_of({**config, "encoder": given}, model, latent, None)
    stage = DiffusionStage(
        diffusion=model,
        sampler=None,  # type: ignore[arg-type]  # draws panels only
        grid=[],
        alignment=alignment,
        **{k: v for k, v in options.items() if k not in ("latent_scale", "panel_steps")},
    )
    parts = {"denoiser": backbone, "conditioners": model.conditioners, "frozen first stage": first_stage}
    if alignment is not None:
        sample |= _features(alignment, size) if "moments" in sample else {}
        parts |= {"projectors": alignment.projectors, "frozen encoders": alignment.encoders}
    if config.get("teacher"):
        parts["teacher"] = _teacher(model, {k: v for k, v in node.items() if k != "numbers"}, latent.values)
    return stage, parts, _batch(sample | (_stored(reads, size) | sample))


def _teacher(model: Any, node: dict[str, Any], values: int) -> nn.Module:
    """The network that `model` is distilled from; its conditioners are the teacher's and not trained."""
    with torch.device("meta"):
        teacher: nn.Module = instantiate(node, where="backbone")
    shared = model.conditioners, model.schedule, model.prediction
    known = LatentDiffusion(model.first_stage, model.latent_scale, teacher, *shared, guidance_trained=True)
    model.distil(known, values)
    model.conditioners.requires_grad_(False)
    return teacher


def _classifier(config: Config, options: dict[str, Any]) -> Made:
    from ldmlab.training.classifier_module import ClassifierStage

    check_stage_options(ClassifierStage, config)
    first_stage, sample = _latents(config, None)
    channels = latent_spec(first_stage, config["data"]["image_size"]).channels
    with torch.device("meta"):
        classifier = instantiate({**config["classifier"], "latent_channels": channels}, where="classifier")
    stage = ClassifierStage(
        space=LatentSpace(first_stage, LatentScale()),
        schedule=instantiate(config["diffusion"]["schedule"], where="diffusion.schedule"),
        classifier=classifier,
        **{name: value for name, value in options.items() if name != "latent_scale"},
    )
    return stage, {"classifier": classifier, "frozen first stage": first_stage}, _batch({**sample, "class_id": 0})


def _latents(config: Config, task: Any) -> tuple[Any, dict[str, Any]]:
    """The first stage, and what a sample holds of an image: its moments, or the image where it is encoded on the fly.

    Pixels and tasks that cut or change images are trained on images, as is whatever names from_run.
    """
    size = config["data"]["image_size"]
    with torch.device("meta"):
        first_stage = instantiate(config["first_stage"], where="first_stage").eval()
        check_divides(size, first_stage.downsampling)
        if config["from_run"] or not first_stage.state_dict() or (task is not None and "image" in task.needs):
            return first_stage, {"image": np.zeros((3, size, size), np.uint8)}
        with torch.no_grad():
            moments = first_stage.encode(torch.zeros(1, 3, size, size)).moments()
    return first_stage, {"moments": np.zeros(moments.shape[1:], np.float16)}


def _features(alignment: Alignment, size: int) -> dict[str, Any]:
    """Stored features of each encoder in place of the encoder."""
    image = torch.zeros(1, 3, size, size, device="meta")
    found = {name: encoder(image)[0] for name, encoder in alignment.encoders.items()}
    alignment.encoders.clear()
    return {f"{STATES_PREFIX}{ENCODER_PREFIX}{n}": np.zeros(part.shape, np.float16) for n, part in found.items()}


def _stored(names: frozenset[str], size: int) -> dict[str, Any]:
    """Fields of a sample that conditioners read, or that a task starts from."""
    boxes = [{"class_id": 0, "box": [0.1, 0.1, 0.9, 0.9]}] * 3
    image = np.zeros((3, 2 * size, 2 * size), np.uint8)
    maps = {"mask": image[:1], "segmentation": image[0], "image": image, "boxes": boxes}
    fields = {"caption": "a caption", "class_id": 0, "reference": image[:, :size, :size], "boxes": boxes, **maps}
    return {name: value for name, value in fields.items() if name in {*names, "image"}}


def _untrained(node: Config) -> dict[str, Any]:
    """The node of a published CLIP model by its architecture, without its weights; others as they are."""
    if not isinstance(node.get("name"), str) or "pretrained" not in node:
        return dict(node)
    if node.get("config") is not None:
        check_source("conditioner" if "drop" in node else "clip", node["name"], node["pretrained"], node["config"])
    known = open_clip.get_model_config(node["name"])
    if known is None:
        raise InputError(
            f"{node['name']} is no model of open_clip; {did_you_mean(node['name'], open_clip.list_models())}"
        )
    pixels = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return {**node, "name": None, "pretrained": None, "config": known | pixels}


class _NoVocabulary:
    """Stands for a tokenizer whose vocabulary is not needed: captions of full length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, captions: list[str]) -> Tensor:
        return torch.zeros(len(captions), self.length, dtype=torch.int64)

    def lost(self, caption: str) -> str:
        """None of it."""
        return ""


def _batch(sample: dict[str, Any]) -> dict[str, Any]:
    rows = [{**sample, "key": str(number), "position": number, "skipped": []} for number in range(IMAGES)]
    return collate(rows, rows[0])


_STAGES = {"autoencoder": _autoencoder, "classifier": _classifier, "clip": _clip, "diffusion": _diffusion}
