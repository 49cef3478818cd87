"""What stage=classifier consists of: a classifier of noisy latents on the latents of a denoiser."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from ldmlab.app import plans
from ldmlab.checkpoints import fingerprint
from ldmlab.data.manifest import Manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.diffusion.latent_space import LatentSpace
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate


def classifier_plan(config: Mapping[str, Any], data: ShardData, options: dict[str, Any]) -> "plans.Plan":
    """The classifier sees what a denoiser with the same data, latent_scale and diffusion.schedule sees."""
    from ldmlab.training.classifier_module import ClassifierStage

    first_stage, first_node, manifest = plans.first_stage_of(config, data)
    if manifest is not None and manifest.latents is not None:  # the latents know the size of their images
        data = replace(data, image_size=manifest.latents["image_size"])
    latent = plans.latent_spec(first_stage, data.image_size)
    node = {**config["classifier"], "latent_channels": latent.channels}
    reads: Literal["images", "latents"] = "latents" if data.latents is not None else "images"
    _check_classes(data, manifest or data.manifest("train", reads), node["classes"])
    scale_node = plans.latent_scale_node(options.pop("latent_scale"), first_stage, data, manifest)
    schedule_node = config["diffusion"]["schedule"]
    stage = ClassifierStage(
        space=LatentSpace(first_stage, instantiate(scale_node, where="stage.latent_scale")),
        schedule=instantiate(schedule_node, where="diffusion.schedule"),
        classifier=instantiate(node, where="classifier"),
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
    return plans.Plan(stage, spec, reads, used={"first_stage": first_node})


def _check_classes(data: ShardData, manifest: Manifest, classes: int) -> None:
    """Labels must be read, and there must be an output for each of them."""
    if "class_id" not in data.fields:
        raise InputError(
            f"data.fields={list(data.fields)} holds no class_id, which stage=classifier learns; "
            "add it: data.fields=[class_id]."
        )
    known = len(manifest.classes or [])
    if known > classes:
        raise InputError(
            f"classifier.classes={classes} but the data have {known} classes; give classifier.classes={known}."
        )
