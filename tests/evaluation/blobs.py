"""Smooth random images with captions and classes, of which no two are alike."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldmlab.data.index_tars import index_tars
from ldmlab.data.shard_data import ShardData
from ldmlab.data.tars import END_MARKER, tar_bytes

SIZE = 16


def blob(seed: int) -> Tensor:
    """uint8 (3, H, W)."""
    noise = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(noise, size=(SIZE, SIZE), mode="bicubic")[0]
    return (127.5 + 60 * image).clamp(0, 255).to(torch.uint8)


def write_blobs(folder: Path, seeds: Sequence[int]) -> None:
    """A shard of the blobs of these seeds; a seed twice is an image twice."""
    folder.mkdir(parents=True)
    data = b""
    for number, seed in enumerate(seeds):
        file = io.BytesIO()
        Image.fromarray(blob(seed).permute(1, 2, 0).numpy()).save(file, "PNG")
        fields = {"caption": f"blob {seed}", "class_id": seed % 64}
        data += tar_bytes(f"{number:05}.json", json.dumps(fields).encode())
        data += tar_bytes(f"{number:05}.png", file.getvalue())
    (folder / "00000.tar").write_bytes(data + END_MARKER)
    index_tars([folder], split=folder.name, origin="drawn by a test", licence="none", workers=1)


def blob_data(folder: Path, train: Sequence[int], val: Sequence[int], fields: tuple[str, ...]) -> ShardData:
    """Both splits."""
    write_blobs(folder / "train", train)
    write_blobs(folder / "val", val)
    return ShardData(str(folder / "train"), str(folder / "val"), image_size=SIZE, fields=fields, workers=0)
