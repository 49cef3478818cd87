"""Description of a measurement in every result: reference images, feature network, sizes, speed."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import nn

from ldmlab import distributed
from ldmlab.checkpoints import fingerprint
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.metrics.features import FeatureExtractor

FORMAT_VERSION = 1
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
    also = ("preparation", "text_name", "text_weights_hash", "quality")
    return found | {name: getattr(extractor, name) for name in also if getattr(extractor, name, None)}


def parameters_record(diffusion: nn.Module) -> dict[str, int]:
    """Sizes as the paper's tables count them: the denoiser with its conditioners, and the first stage apart."""
    first_stage = getattr(diffusion, "first_stage", None)
    first = sum(p.numel() for p in first_stage.parameters()) if isinstance(first_stage, nn.Module) else 0
    return {"parameters": sum(p.numel() for p in diffusion.parameters()) - first, "first_stage_parameters": first}


def perceptual_record(lpips: nn.Module | None) -> dict[str, str] | None:
    """The network behind LPIPS and PSIM; None where its weights are missing, so that neither was measured."""
    return (
        None
        if lpips is None
        else {"name": "LPIPS v0.1, VGG-16", "weights_hash": fingerprint(dict(lpips.named_buffers()))}
    )


def check_reference(protocol: Protocol, data: ShardData) -> None:
    """Refuse reference images with another preparation or hash than the protocol requires."""
    folder, manifest = data.folder(protocol.reference, "images"), data.manifest(protocol.reference, "images")
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


def timed(items: Iterable[T], clock: list[float]) -> Iterator[T]:
    """The same items; the seconds spent waiting for each are added to `clock`."""
    stream = iter(items)
    while True:
        began = time.monotonic()
        try:
            item = next(stream)
        except StopIteration:
            return
        clock.append(time.monotonic() - began)
        yield item


def throughput(images: int, clock: Sequence[float]) -> dict[str, Any]:
    """Images a second over all processes of sampling, and the hardware."""
    slowest = max(distributed.gather(sum(clock)))
    rate = float(f"{images / slowest:.4g}") if slowest > 0 else None
    return {"images_per_second": rate, "processes": distributed.world_size(), "hardware": _hardware()}


def _hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def all_items(mine: Iterable[T]) -> list[T]:
    """The items of all processes in one list."""
    return list(chain.from_iterable(distributed.gather(list(mine))))
