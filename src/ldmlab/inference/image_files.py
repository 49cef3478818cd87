"""The images of a report: small PNG files next to metrics.json, which holds their paths."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldmlab.errors import InputError

FOLDER = "images"


def save_image(out: Path, kind: str, number: int, image: Tensor) -> str:
    """uint8 (3, H, W) or (H, W, 3) => its path relative to `out`."""
    channels_last = image if image.shape[-1] == 3 else image.permute(1, 2, 0)
    name = f"{FOLDER}/{kind}_{number:05d}.png"
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    Image.fromarray(channels_last.contiguous().numpy()).save(out / name)
    return name


def readable(images: Dataset[dict[str, Any]], count: int, number: int) -> Tensor:
    """Image `number` of a split, or the first after it that can be read."""
    for place in range(number, number + count):
        sample = images[place % count]
        if "image" in sample:
            return torch.as_tensor(sample["image"])
    raise InputError(f"none of the {count} reference images can be read; pack them again.")


def planned(known: Sequence[Mapping[str, Any]], count: int, size: int) -> dict[str, list[dict[str, Any]]]:
    """`size` of the first `count`, spread evenly, so that samples and the real images of their captions match."""
    numbers = [number * count // size for number in range(size)]
    return {
        kind: [
            {
                "number": number,
                "file": f"{FOLDER}/{name}_{number:05d}.png",
                "caption": str(known[number].get("caption", known[number].get("class_id", ""))),
            }
            for number in numbers
        ]
        for kind, name in (("samples", "sample"), ("real", "real"))
    }


def copy_images(out: Path, sources: Sequence[tuple[str, Path]]) -> list[dict[str, str]]:
    """Images from elsewhere (sweeps, trajectories) with their titles, copied unchanged."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    copied = []
    for number, (title, source) in enumerate(sources):
        name = f"{FOLDER}/extra_{number:02d}{source.suffix}"
        (out / name).write_bytes(source.read_bytes())
        copied.append({"title": title, "file": name})
    return copied


def copy_curves(out: Path, sources: Mapping[str, Path]) -> list[dict[str, str]]:
    """The metrics.csv of runs with their titles, copied; missing ones are left out."""
    (out / "curves").mkdir(parents=True, exist_ok=True)
    copied = []
    for number, (title, path) in enumerate(sources.items()):
        if path.exists():
            name = f"curves/{number}.csv"
            shutil.copyfile(path, out / name)
            copied.append({"title": title, "file": name})
    return copied
