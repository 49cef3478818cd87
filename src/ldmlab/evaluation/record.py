"""What a result holds besides its scores: reference images, feature network, sizes, speed, and the report's files."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor, nn

from ldmlab import distributed
from ldmlab.checkpoints import fingerprint
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.manifest import Manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.data.shards import Folder
from ldmlab.data.transforms import RULES
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol

FORMAT_VERSION = 1
IMAGES = "images"  # folder of small PNG files next to metrics.json, which holds their paths
Paper = Callable[[Mapping[str, Any]], dict[str, Any] | None]  # a result => its row in the paper's table
T = TypeVar("T")


def reference_record(data: ShardData, split: str, images: int) -> dict[str, Any]:
    """The real images of a result, identified by the hash of their manifest."""
    manifest = data.manifest(split, "images")
    return {
        "folder": str(data.folder(split, "images")),
        "split": split,
        "images": images,
        "split_images": manifest.total,
        "manifest_hash": manifest.hash,
        "transform": manifest.transform,
        "image_size": data.image_size,
        "resized": _resized(manifest.image_size, data),
        "task": None if data.task is None else repr(data.task.held_out),
        "source": manifest.source,
    }


def _resized(stored: int | None, data: ShardData) -> str | None:
    """What the loader does to images that are stored at another size or none; None where they are used as packed."""
    if stored == data.image_size or data.task is not None:  # a task prepares its images itself
        return None
    size = "images of any size" if stored is None else f"{stored} px"
    return f"from {size} to {data.image_size} px while reading, centre square, Pillow's bicubic with antialiasing"


def features_record(extractor: FeatureExtractor) -> dict[str, Any]:
    """The network whose features were compared, the preprocessing of images, and the CLIP model if there is one."""
    found = {"name": extractor.name, "weights_hash": extractor.weights_hash, "width": extractor.width}
    also = ("preparation", "text_name", "text_weights_hash", "quality", "own_parameters")
    return found | {name: getattr(extractor, name) for name in also if getattr(extractor, name, None)}


def parameters_record(diffusion: nn.Module) -> dict[str, Any]:
    """Sizes as the paper's tables count them: denoiser with conditioners, first stage apart; and its classes."""
    first_stage = getattr(diffusion, "first_stage", None)
    first = sum(p.numel() for p in first_stage.parameters()) if isinstance(first_stage, nn.Module) else 0
    count = sum(p.numel() for p in diffusion.parameters()) - first
    kinds = {"backbone": type(diffusion.backbone).__name__, "process": type(diffusion.path).__name__}
    return {"parameters": count, "first_stage_parameters": first, **kinds}


def perceptual_record(lpips: nn.Module | None) -> dict[str, str] | None:
    """The network behind LPIPS and PSIM; None where its weights are missing, so that neither was measured."""
    if lpips is None:
        return None
    return {"name": "LPIPS v0.1, VGG-16", "weights_hash": fingerprint(dict(lpips.named_buffers()))}


def throughput(images: int, clock: Sequence[float]) -> dict[str, Any]:
    """Images a second over all processes of sampling, and the hardware."""
    slowest = max(distributed.gather(sum(clock)))
    rate = float(f"{images / slowest:.4g}") if slowest > 0 else None
    return {"images_per_second": rate, "processes": distributed.world_size(), "hardware": distributed.hardware()}


def all_items(mine: Iterable[T]) -> list[T]:
    """The items of all processes in one list."""
    return list(chain.from_iterable(distributed.gather(list(mine))))


# ---- reference images


def check_reference(protocol: Protocol, data: ShardData) -> None:
    """Refuse reference images with another preparation or hash than the protocol requires."""
    folder, manifest = data.folder(protocol.reference, "images"), data.manifest(protocol.reference, "images")
    check_transform(folder, manifest)
    rule = manifest.transform.get("rule")
    if protocol.reference_rule is not None and rule != protocol.reference_rule:
        raise InputError(
            f"the reference images in {folder} were prepared by the rule {rule}, but "
            f"protocol={protocol.name} compares with {protocol.reference_rule}; pack them with "
            f"--crop {protocol.reference_rule}, or set protocol.reference_rule=null for a score that is marked."
        )
    if protocol.reference_hash is not None and manifest.hash != protocol.reference_hash:
        raise InputError(
            f"the reference images in {folder} have the manifest hash {manifest.hash[:12]}..., but "
            f"protocol.reference_hash={protocol.reference_hash[:12]}...; give the pinned set, or set it to null."
        )


def check_transform(folder: Folder, manifest: Manifest) -> None:
    """Refuse images whose manifest contradicts itself on how they were prepared; state what it does not record.

    Tars that were indexed as they are record nothing of it.
    """
    transform, side = manifest.transform, manifest.image_size
    known = {name: value for name, value in transform.items() if value is not None or name in ("size", "quality")}
    size = known.get("size")
    wrong = {
        "size": type(size) not in (int, type(None)) or (None not in (size, side) and size != side),
        "rule": known.get("rule", "keep") not in tuple(RULES),
        "format": not isinstance(known.get("format", ""), str),
        "quality": type(known.get("quality")) not in (int, type(None)),
    }
    if name := next((name for name, found in wrong.items() if found), None):
        raise InputError(
            f"the manifest of {folder} records transform.{name}={transform[name]!r:.40} beside image_size={side}, "
            "which no images are prepared with; pack them again, or write a manifest of the tars as they are with "
            "`ldmlab index`."
        )
    if missing := [f"transform.{name}" for name in (*wrong, "background") if name not in known]:
        distributed.say(
            f"the manifest of {folder} does not record {', '.join(missing)}: its images are scored as they are, "
            f"transparent pixels on the colour {manifest.background}"
        )


# ---- files of the report


def save_image(out: Path, kind: str, number: int, image: Tensor) -> str:
    """uint8 (3, H, W) or (H, W, 3) => its path relative to `out`."""
    channels_last = image if image.shape[-1] == 3 else image.permute(1, 2, 0)
    name = image_file(kind, number)
    (out / IMAGES).mkdir(parents=True, exist_ok=True)
    Image.fromarray(channels_last.contiguous().numpy()).save(out / name)
    return name


def image_file(kind: str, number: int) -> str:
    """Where `save_image` writes, relative to the folder of the evaluation."""
    return f"{IMAGES}/{kind}_{number:05d}.png"


def planned(known: Sequence[Mapping[str, Any]], count: int, size: int) -> dict[str, list[dict[str, Any]]]:
    """`size` of the first `count`, spread evenly, so that samples and the real images of their captions match."""
    numbers = [number * count // size for number in range(size)]
    captions = [str(known[number].get("caption", known[number].get("class_id", ""))) for number in numbers]
    return {
        kind: [
            {"number": number, "file": image_file(name, number), "caption": caption}
            for number, caption in zip(numbers, captions, strict=True)
        ]
        for kind, name in (("samples", "sample"), ("real", "real"))
    }


def copied(out: Path, names: str, sources: Iterable[tuple[str, Path]]) -> list[dict[str, str]]:
    """Files from elsewhere with their titles, copied unchanged; `names`: of the copies, by number."""
    found = []
    (out / names).parent.mkdir(parents=True, exist_ok=True)
    for number, (title, source) in enumerate(sources):
        name = names.format(number) + source.suffix
        shutil.copyfile(source, out / name)
        found.append({"title": title, "file": name})
    return found
