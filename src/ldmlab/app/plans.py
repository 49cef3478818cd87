"""Parts of each stage, derived from its configuration: one function a stage, found by name."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from ldmlab.app.alignment_plan import alignment_of, first_stage_with_encoder
from ldmlab.app.conditioning import build_conditioners, check_fields_given, context_widths
from ldmlab.app.teacher import Teacher
from ldmlab.argument_types import check_type, check_types
from ldmlab.build import build_latent_diffusion, load_first_stage, moments_of
from ldmlab.checkpoints import fingerprint
from ldmlab.contracts import LatentSpec
from ldmlab.data.latent_shards import Statistics
from ldmlab.data.manifest import Manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, check_arguments, instantiate, locate
from ldmlab.interop.published_weights import weights_path
from ldmlab.nn.lpips import LPIPS
from ldmlab.training.sharded_start import built_sharded
from ldmlab.training.stage import Stage

Config = Mapping[str, Any]
Kind = Literal["images", "latents"]  # of shards
_STATISTICS_IMAGES = 10_000  # enough for a latent scale that no batch decides


@dataclass(frozen=True)
class Plan:
    """A stage ready to fit, and its description in the run folder."""

    stage: Stage
    spec: dict[str, Any]  # model.yaml
    reads: Kind
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # parts that checkpoints leave out
    used: dict[str, Any] = field(default_factory=dict)  # groups that came with other choices, as they are
    hashes: dict[str, str] = field(default_factory=dict)  # of frozen parts that neither models nor checkpoints hold


def autoencoder(config: Config, data: ShardData, options: dict[str, Any]) -> Plan:
    """A first stage and its loss, with the LPIPS network where the loss gives it a weight."""
    from ldmlab.training.autoencoder_module import AutoencoderStage

    check_stage_options(AutoencoderStage, config)
    first_stage, node, alignment = first_stage_with_encoder(config)
    check_divides(data.image_size, first_stage.downsampling)
    lpips: dict[str, Any] = {"lpips": LPIPS(weights_path("lpips"))} if config["loss"].get("lpips_weight") else {}
    loss = instantiate(config["loss"], where="loss", **lpips, **alignment)
    check_smallest(loss, data.image_size)
    stage = AutoencoderStage(first_stage=first_stage, loss=loss, background=data.object_background, **options)
    spec = {"kind": "first_stage", "image_size": data.image_size, "first_stage": node}
    hashes = {"encoder": alignment["alignment"].encoder.weights_hash} if alignment else {}
    return Plan(stage, spec, "images", hashes=hashes)


def clip(config: Config, data: ShardData, options: dict[str, Any]) -> Plan:
    from ldmlab.training.clip_module import ClipStage

    check_stage_options(ClipStage, config)
    model = instantiate(config["clip"], where="clip", image_size=data.image_size)
    stage = ClipStage(model=model, **options)
    node = {"_target_": "ldmlab.nn.openclip.build_clip", "config": model.config}  # rebuilds without a network
    spec = {"kind": "clip", "image_size": data.image_size, "clip": node}
    return Plan(stage, spec, "images")


def diffusion(config: Config, data: ShardData, options: dict[str, Any]) -> Plan:
    """A denoiser on latent shards, or on image shards with the first stage run on the fly."""
    from ldmlab.training.diffusion_module import DiffusionStage

    check_stage_options(DiffusionStage, config)
    first_stage, first_node, manifest, data = first_stage_of(config, data)
    latent = latent_spec(first_stage, data.image_size)
    conditioners, nodes = build_conditioners(config["conditioner"], latent)
    teacher, scale_choice = Teacher.of(config), options.pop("latent_scale")
    lent = None if teacher is None else teacher.lend(first_stage, conditioners)
    check_fields_given(conditioners, data)
    backbone_node = sized_backbone(config["backbone"], latent, conditioners, config["diffusion"])
    scale_node = lent or latent_scale_node(scale_choice, first_stage, data, manifest)
    spec = {
        "kind": "latent_diffusion",
        "image_size": data.image_size,
        "first_stage": first_node,
        "latent_scale": scale_node,
        "backbone": backbone_node,
        "conditioners": nodes,
        "diffusion": config["diffusion"],
        "guidance_trained": any(c.drop > 0 for c in conditioners.values()),
        "sampler": config["sampler"],
        **({"task": task_node(config, data.image_size)} if data.task else {}),
    }
    ready: dict[str, Any] = {"first_stage": first_stage, "conditioners": conditioners, "task": data.task}
    if teacher is None:  # else the weights are the teacher's, whole in every process
        ready["backbone"] = built_sharded(config["trainer"], lambda: instantiate(backbone_node, where="backbone"))
    model = build_latent_diffusion(spec, **ready)
    spec["guidance_trained"] = model.guidance_trained
    if teacher is not None:
        spec["teacher_fingerprint"] = teacher.teach(model, latent.values)  # type: ignore[arg-type]
    check_size_step(data.image_size, model.size_step)
    sampler = instantiate(config["sampler"], where="sampler")
    spacing = sampler.spacing if hasattr(model.schedule, "steps") else "auto"  # a continuous path has its own
    grid = model.path.at_size(latent.values).grid(options.pop("panel_steps"), spacing)
    options["alignment"] = alignment_of(config, model, latent, data)
    stage = DiffusionStage(diffusion=model, sampler=sampler, grid=grid, **options)
    frozen = {} if "conditioner" in stage.saved() else {"conditioner": model.conditioners}
    return Plan(stage, spec, _reads(data), {"first_stage": model.first_stage, **frozen}, {"first_stage": first_node})


def _reads(data: ShardData) -> Kind:
    return "latents" if data.latents is not None else "images"


def classifier(config: Config, data: ShardData, options: dict[str, Any]) -> Plan:
    """A classifier of noisy latents, to guide a denoiser with the same data, latent_scale and diffusion.schedule."""
    from ldmlab.training.classifier_module import ClassifierStage

    check_stage_options(ClassifierStage, config)
    first_stage, first_node, manifest, data = first_stage_of(config, data)
    latent = latent_spec(first_stage, data.image_size)
    node = {**config["classifier"], "latent_channels": latent.channels}
    if "class_id" not in data.fields:
        raise InputError(
            f"data.fields={list(data.fields)} holds no class_id, which stage=classifier learns; "
            "add it: data.fields=[class_id]."
        )
    known = len((manifest or data.manifest("train", _reads(data))).classes or [])
    if known > node["classes"]:
        raise InputError(
            f"classifier.classes={node['classes']} but the data have {known} classes; give classifier.classes={known}."
        )
    scale_node = latent_scale_node(options.pop("latent_scale"), first_stage, data, manifest)
    schedule_node = config["diffusion"]["schedule"]
    stage = ClassifierStage(
        space=LatentSpace(first_stage, instantiate(scale_node, where="stage.latent_scale")),
        schedule=instantiate(schedule_node, where="diffusion.schedule"),
        classifier=built_sharded(config["trainer"], lambda: instantiate(node, where="classifier")),
        **options,
    )
    spec = {
        "kind": "classifier",
        "image_size": data.image_size,
        "classifier": node,
        "first_stage_fingerprint": fingerprint(first_stage.state_dict()),
        "latent_scale": scale_node,
        "schedule": schedule_node,
    }
    return Plan(stage, spec, _reads(data), used={"first_stage": first_node})


PLANS: dict[str, Callable[[Config, ShardData, dict[str, Any]], Plan]] = {
    plan.__name__: plan for plan in (autoencoder, classifier, clip, diffusion)
}


def check_stage_options(stage: type[Stage], config: Config) -> None:
    """Options of conf/stage against the names and types of the stage's arguments."""
    given = {name: value for name, value in config["stage"].items() if name != "name"}
    for name, annotation in (("panel_steps", int), ("latent_scale", str | float)):  # used up before the stage is built
        if name in given and name not in inspect.signature(stage).parameters:
            check_type(given.pop(name), annotation, f"stage.{name}")
    own = {name: given.pop(name) for name in list(given) if name in inspect.signature(stage).parameters}
    check_types(stage, own, "stage")
    check_arguments(Stage, given, "stage", complete=False)  # a stage passes the rest on to the base
    check_types(Stage, given, "stage")


def task_node(config: Config, image_size: int) -> dict[str, Any]:
    return {**config["task"], "image_size": image_size}


def check_divides(image_size: int, downsampling: int) -> None:
    if image_size % downsampling:
        below = max(image_size // downsampling, 1) * downsampling
        raise InputError(
            f"data.image_size={image_size} is not a multiple of the first stage's downsampling factor {downsampling}; "
            f"use {below} or {below + downsampling}, or a first_stage with another factor."
        )


def check_smallest(loss: Any, image_size: int) -> None:
    """InputError before the steps at which the discriminator or LPIPS would see its first image."""
    if (least := getattr(loss, "smallest_image", 1)) > image_size:
        raise InputError(
            f"data.image_size={image_size} is too small for this loss, whose networks need {least} px a side; choose "
            "larger images or fewer loss.adversary.discriminator.layers."
        )


def check_size_step(image_size: int, step: int) -> None:
    if image_size % step:
        raise InputError(
            f"data.image_size={image_size} is not a multiple of {step}, the pixels of the backbone's patches or "
            "narrowest level; choose a multiple, or another backbone.patch_size or number of levels."
        )


def latent_spec(first_stage: Any, image_size: int) -> LatentSpec:
    f = first_stage.downsampling
    check_divides(image_size, f)
    return LatentSpec(first_stage.latent_channels, image_size // f, image_size // f, f)


def first_stage_of(config: Config, data: ShardData) -> tuple[nn.Module, dict[str, Any], Manifest | None, ShardData]:
    """The frozen first stage: with the latents, of from_run, or the identity; the latents' manifest, and the data with
    the size of the images that latents were made from."""
    if data.latents is not None:
        manifest = data.manifest("train", "latents")
        loaded = load_first_stage(config["from_run"] or data.first_stage())
        recorded = manifest.latents or {}
        if recorded.get("fingerprint") != loaded.fingerprint:
            raise InputError(
                f"data.latents={data.latents} was made by another first stage ({recorded.get('fingerprint')}) than "
                f"{loaded.files.folder} ({loaded.fingerprint}); encode again with `ldmlab encode`."
            )
        return loaded.module, loaded.spec, manifest, replace(data, image_size=recorded["image_size"])
    if config["from_run"] is not None:
        loaded = load_first_stage(config["from_run"])
        return loaded.module, loaded.spec, None, data
    module = instantiate(config["first_stage"], where="first_stage")
    if module.state_dict():
        raise InputError(
            "stage=diffusion needs a trained first stage: give data.latents=FOLDER (made by `ldmlab encode`), "
            "from_run=RUN to encode on the fly, or first_stage=identity for pixels."
        )
    return module, dict(config["first_stage"]), None, data


def latent_scale_node(
    choice: Any, first_stage: nn.Module, data: ShardData, manifest: Manifest | None
) -> dict[str, Any]:
    """The node of the latent scale, in numbers, so that model.yaml needs no latents."""
    if isinstance(choice, int | float) and not isinstance(choice, bool):
        if not 0 < choice < float("inf"):
            raise InputError(f"stage.latent_scale={choice} must be a factor above 0, measured or per_channel.")
        scale = LatentScale.fixed(choice)
    elif choice not in ("measured", "per_channel"):
        raise InputError(f"stage.latent_scale={choice} is unknown; choose measured, per_channel or a factor.")
    elif not first_stage.state_dict():
        scale = LatentScale()  # pixels are in [-1, 1] already
    else:
        statistics = manifest.latents["statistics"] if manifest and manifest.latents else measure(first_stage, data)
        scale = LatentScale.measured(statistics, per_channel=choice == "per_channel")
    target = "ldmlab.diffusion.latent_space.LatentScale"
    return {"_target_": target, "std": scale.std.tolist(), "shift": scale.shift.tolist()}


@torch.no_grad()
def measure(first_stage: Any, data: ShardData) -> dict[str, Any]:
    """Statistics of the latents of at most 10,000 training images, for a run that encodes on the fly."""
    statistics = Statistics()
    for batch in data.eval_loader("train", 64, limit=_STATISTICS_IMAGES, kind="images"):
        for image in (batch["image"], batch["image"].flip(-1))[: 2 if data.flip else 1]:
            for moments in moments_of(first_stage, image)[:, None]:
                statistics.add_moments(moments.numpy(), first_stage.latent_channels)
    return statistics.summary()


def sized_backbone(
    node: Config, latent: LatentSpec, conditioners: Mapping[str, Any], diffusion: Config | None = None
) -> dict[str, Any]:
    """The node with channels, widths and numbers that follow from the latent, the conditioning and the diffusion."""
    outputs, numbers = 1, 0
    if diffusion is not None:
        outputs = getattr(locate(diffusion["prediction"], where="diffusion.prediction"), "outputs", 1)
        counted = getattr(locate(diffusion, where="diffusion"), "numbers", None)
        numbers = counted(diffusion) if counted else 0
    widths = context_widths(conditioners, latent)
    pooled = [one.pooled_width for one in conditioners.values() if hasattr(one, "pooled_width")]
    sizes = {
        "in_channels": latent.channels + widths["spatial"],
        "out_channels": outputs * latent.channels,
        "context_width": widths["tokens"] or None,
        "vector_width": widths["vector"] or None,
        **({"numbers": numbers} if numbers else {}),
        **({"pooled_width": pooled[0]} if pooled else {}),
    }
    return {**node, **{name: value for name, value in sizes.items() if accepts(node, name, where="backbone")}}
