"""Reader of format 1: names in files written by ldmlab 0.1, translated to today's.

Run folders, checkpoints, model folders, shards and scores of that version load unchanged. Only this file has old names.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

TARGETS: dict[str, str] = {
    "ldmlab.diffusion.latent_scale.LatentScale": "ldmlab.diffusion.latent_space.LatentScale",  # `_target_` then => now
    "ldmlab.conditioners.layout.LayoutTokens": "ldmlab.conditioners.layout_tokens.LayoutTokens",
    "ldmlab.conditioners.masked_latent.MaskedLatent": "ldmlab.conditioners.mask.MaskedLatent",
    "ldmlab.conditioners.semantic.SpatialRescaler": "ldmlab.conditioners.semantic_map.SpatialRescaler",
    "ldmlab.conditioners.transformer_text.TransformerText": "ldmlab.conditioners.text.TransformerText",
    "ldmlab.losses.autoencoder.AutoencoderLoss": "ldmlab.losses.autoencoder_loss.AutoencoderLoss",
    "ldmlab.losses.reconstruction.ReconstructionLoss": "ldmlab.losses.reconstruction_loss.ReconstructionLoss",
    "ldmlab.metrics.clip_score.ClipScore": "ldmlab.metrics.clip_scores.ClipScore",
    "ldmlab.metrics.clip_distance.ClipDistance": "ldmlab.metrics.clip_scores.ClipDistance",
    "ldmlab.metrics.density_coverage.DensityCoverage": "ldmlab.metrics.precision_recall.DensityCoverage",
    "ldmlab.metrics.together.inception_and_clip": "ldmlab.metrics.features.inception_and_clip",
}

VALUES: dict[tuple[str, str], dict[Any, Any]] = {  # (`_target_` now, argument now) => {value then: value now}
    ("ldmlab.diffusion.schedule.Schedule", "name"): {"linear": "scaled_linear", "sqrt_linear": "linear"},
    ("ldmlab.losses.autoencoder_loss.AutoencoderLoss", "reduction"): {"sum_per_picture": "sum_per_image"},
    ("ldmlab.losses.reconstruction_loss.ReconstructionLoss", "reduction"): {"sum_per_picture": "sum_per_image"},
}

GROUPS = {"autoencoder": "generator", "adversary": "discriminator"}  # optimizer groups of a first stage

METRICS: dict[str, str] = {  # prefix of a column of metrics.csv or of a checkpoint's notes then => now
    "held_out/": "val/",
    "speed/pictures_per_second": "speed/images_per_second",
    "pictures": "images",
    **{f"gradient_norm/{then}": f"gradient_norm/{now}" for then, now in GROUPS.items()},
    **{f"learning_rate/{then}": f"learning_rate/{now}" for then, now in GROUPS.items()},
}

CONFIG: dict[str, str] = {  # dotted key of a run's config.yaml then => last part of it now
    "stage.guidance": "guidance_scale",
    "stage.held_out_draws": "val_draws",
}

_PICTURE = re.compile(r"(?<![^_])picture(s?)(?![^_])")

RECORD: dict[str, str] = {  # dotted key of metrics.json then, through lists => last part of it now
    "sampling.guidance": "guidance_scale",
    "protocol.guidance": "guidance_scale",
    "protocol.category_guidance": "category_guidance_scale",
    "protocol.guidance_curve": "guidance_scale_curve",
    "guidance_curve": "guidance_scale_curve",
    "guidance_curve.guidance": "guidance_scale",
    "categories.guidance": "guidance_scale",
    "model.guides": "guiders",
}


def config(value: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a run's config.yaml with today's keys, targets and values."""
    return dict(_renamed(node(value), CONFIG))


def record(value: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a metrics.json with today's keys."""
    return _evaluators(dict(_images(_renamed(value, RECORD))))


def _evaluators(result: dict[str, Any]) -> dict[str, Any]:
    """`judges` and `categories`, which measured conditioning by classes of their own, as `evaluators`."""
    found = {name: {**one, "real": one["held_out_real"]} for name, one in (result.pop("judges", None) or {}).items()}
    if categories := result.pop("categories", None):
        real = categories["held_out_real"]
        training = {**categories["training_captions"], "chance": categories["chance"], "held_out_real": real}
        found["category"] = {**_category(categories), "training_captions": _category(training)}
    return result | {"evaluators": found} if found else result


def _category(found: Mapping[str, Any]) -> dict[str, Any]:
    rows = found["by_category"]
    share = lambda row, kind: row[f"{kind}_right"] / row[kind] if row[kind] else None  # noqa: E731
    counts = [{"real_count": row["real"], "samples_count": row["samples"]} for row in rows]
    shares = [{"real": share(row, "real"), "samples": share(row, "samples")} for row in rows]
    named = [{"name": row["category"]} for row in rows]
    kept = ("samples", "chance", "learned", "guidance_scale")
    return {
        **{name: found[name] for name in kept if name in found},
        "measures": "samples classified as the class of their condition",
        "how": f"A classifier of {len(rows)} classes, trained on real training images alone, classifies every sample.",
        "real": found["held_out_real"],
        "shuffled": None,
        "of_real": found["ratio"],
        "classes": [name | part | count for name, part, count in zip(named, shares, counts, strict=True)],
        "images": [{**image, "class": image["category"]} for image in found["images"]],
    }


def _renamed(value: Any, names: Mapping[str, str], path: str = "") -> Any:
    if isinstance(value, list):
        return [_renamed(part, names, path) for part in value]
    if not isinstance(value, Mapping):
        return value
    keys = {key: f"{path}.{key}" if path else str(key) for key in value}
    return {names.get(keys[key], key): _renamed(part, names, keys[key]) for key, part in value.items()}


def _images(value: Any) -> Any:
    """Keys that named images pictures; files keep the names they have on disk. Parts get today's names too."""
    if isinstance(value, list):
        return [_images(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    result = {_PICTURE.sub(r"image\1", str(key)): _images(part) for key, part in value.items()}
    return node(result) if "_target_" in result else result


def node(value: Any) -> Any:
    """A configuration node, or anything that holds nodes, with today's targets, arguments and values.

    Only for what format 1 wrote: `linear` of then is not `linear` of today, so translating twice is wrong.
    """
    if isinstance(value, list):
        return [node(part) for part in value]
    if not isinstance(value, Mapping):
        return value
    target = TARGETS.get(str(value.get("_target_")), value.get("_target_"))
    result = {}
    for name, part in value.items():
        known = VALUES.get((str(target), str(name)), {})
        result[name] = known[part] if isinstance(part, str) and part in known else node(part)
    return {**result, "_target_": target} if "_target_" in value else result


def checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of training: optimizer groups, metrics since the last row of the log, and notes."""
    groups = GROUPS if content.get("kind") == "autoencoder" else {}
    notes = {metric(f"{name}/").rstrip("/"): value for name, value in content["notes"].items()}
    return {
        **content,
        "optimizers": {groups.get(name, name): state for name, state in content["optimizers"].items()},
        "metrics": {metric(name): values for name, values in content["terms"].items()},
        "notes": notes,
    }


def metric(name: str) -> str:
    """A metric's name in metrics.csv and in checkpoints."""
    for then, now in METRICS.items():
        if name == then or (then.endswith("/") and name.startswith(then)):
            return now + name[len(then) :]
    return name


def manifest(content: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of shards of format 1 with today's keys."""
    renamed = {("image_size" if key == "picture_size" else key): value for key, value in content.items()}
    if isinstance(latents := renamed.get("latents"), Mapping):
        statistics = _renamed(latents.get("statistics"), {"pictures": "images"})
        renamed["latents"] = {**node(latents), "statistics": statistics}
    return renamed


def manifest_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest as format 1 hashed it, for one of either format; checkpoints hold it."""
    own = {key: value for key, value in content.items() if key not in ("provenance", "crc32c")}
    if "image_size" in own:
        own["picture_size"] = own.pop("image_size")
    own["shards"] = [{key: value for key, value in shard.items() if key != "crc32c"} for shard in own["shards"]]
    own["format_version"] = 1
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
