"""Small shards whose samples are numbered, for the tests of the reading side."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmlab.data.manifest import Manifest, read_manifest, write_manifest
from ldmlab.data.shards import ShardReader
from ldmlab.data.tars import END_MARKER, scan_tar, tar_bytes


def toy_image(number: int, size: int) -> Image.Image:
    """Noise that belongs to `number`."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def webp(number: int, size: int) -> bytes:
    buffer = io.BytesIO()
    toy_image(number, size).save(buffer, "webp", lossless=True)
    return buffer.getvalue()


def write_shards(
    folder: Path, counts: list[int], size: int = 8, bad: tuple[int, ...] = (), classes: int = 3, split: str = "train"
) -> Manifest:
    """Shards of `counts` samples; keys 00000, 00001, ...; the images numbered in `bad` are cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    shards, number = [], 0
    for index, count in enumerate(counts):
        data = b""
        for _ in range(count):
            content = webp(number, size)
            fields = {"caption": f"image {number}", "category": f"c{number % classes}", "class_id": number % classes}
            data += tar_bytes(f"{number:05}.json", json.dumps(fields).encode())
            data += tar_bytes(f"{number:05}.webp", content[: len(content) // 2] if number in bad else content)
            number += 1
        data += END_MARKER
        name = f"{index:05}.tar"
        (folder / name).write_bytes(data)
        shards.append(scan_tar(folder / name)[0])
    manifest = Manifest(
        kind="images",
        split=split,
        shards=shards,
        fields=["caption", "category", "class_id"],
        image_size=size,
        transform={"background": [255, 255, 255]},
        source="made by a test",
        licence="none",
        provenance={},
    )
    write_manifest(folder, manifest)
    return manifest


def keys_of(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in batch["key"]]


def stored_samples(folder: Path) -> dict[str, dict[str, Any]]:
    """Every sample of a split by its key, its parts as they lie in the shards."""
    reader = ShardReader(folder, read_manifest(folder))
    return dict(reader.read(shard, n) for shard, count in enumerate(reader.counts) for n in range(count))
