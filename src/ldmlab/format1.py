"""Reader of format 1: names in files written by ldmlab 0.1, translated to today's.

Run folders, checkpoints, model folders, shards and scores of that version load unchanged. Only this file and
format1.yaml have old names.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_PICTURE = re.compile(r"(?<![^_])picture(s?)(?![^_])")


@cache
def _then_now() -> dict[str, dict[str, Any]]:
    """The tables of names then => now; what each holds stands in the file."""
    return yaml.safe_load(Path(__file__).with_name("format1.yaml").read_text(encoding="utf-8"))


def config(value: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a run's config.yaml with today's keys, targets and values."""
    return dict(_renamed(node(value), _then_now()["config"]))


def record(value: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a metrics.json with today's keys."""
    return _swept(_evaluators(dict(_images(_renamed(value, _then_now()["record"])))))


def _swept(result: dict[str, Any]) -> dict[str, Any]:
    """A curve over the guidance scale as a sweep over settings."""
    protocol = result.get("protocol")
    if isinstance(protocol, Mapping) and "guidance_scale_curve" in protocol:
        protocol = dict(protocol)
        scales = protocol.pop("guidance_scale_curve")
        result["protocol"] = protocol | ({"sweep": {"guidance_scale": scales}} if scales else {})
    points = result.pop("guidance_scale_curve", None)
    return result | ({"sweep": points} if points else {})


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
    target = _then_now()["targets"].get(str(value.get("_target_")), value.get("_target_"))
    values, result = _then_now()["values"].get(str(target), {}), {}
    for name, part in value.items():
        known = values.get(str(name), {})
        result[name] = known[part] if isinstance(part, str) and part in known else node(part)
    return {**result, "_target_": target} if "_target_" in value else result


def checkpoint(content: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of training: optimizer groups, metrics since the last row of the log, and notes."""
    groups = _then_now()["groups"] if content.get("kind") == "autoencoder" else {}
    notes = {metric(f"{name}/").rstrip("/"): value for name, value in content["notes"].items()}
    return {
        **content,
        "optimizers": {groups.get(name, name): state for name, state in content["optimizers"].items()},
        "metrics": {metric(name): values for name, values in content["terms"].items()},
        "notes": notes,
    }


def metric(name: str) -> str:
    """A metric's name in metrics.csv and in checkpoints."""
    for then, now in _then_now()["metrics"].items():
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
