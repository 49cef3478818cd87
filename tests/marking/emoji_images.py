"""The shipped emoji as arrays."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_FOLDER = Path(__file__).parents[2] / "data" / "emoji-256"


def emoji(count: int, size: int) -> list[np.ndarray]:
    """The first images of the training shards, uint8 (size, size, 3) on white."""
    found: list[np.ndarray] = []
    for image in _all():
        found.append(np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)))
        if len(found) == count:
            break
    return found


def _all() -> Iterator[Image.Image]:
    for shard in sorted((_FOLDER / "train").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith((".webp", ".png")):
                    content = tar.extractfile(member)
                    assert content is not None
                    image = Image.open(io.BytesIO(content.read())).convert("RGBA")
                    yield Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def as_jpeg(image: np.ndarray, quality: int = 75) -> np.ndarray:
    """Written as JPEG and read."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def half(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A square crop of half of the area at a random place."""
    side = round(image.shape[0] * 0.5**0.5)
    top, left = rng.integers(0, image.shape[0] - side + 1, 2)
    return image[top : top + side, left : left + side]
