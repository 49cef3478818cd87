"""What scenes consist of: objects cut from emoji images, and textured backgrounds in pale colours of one hue."""

import colorsys
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ldmlab.data.manifest import read_manifest
from ldmlab.data.shards import image_ending, parse_sample, scan_tar
from ldmlab.errors import InputError
from ldmlab.open_image import open_image

# name => captions of its images among the emoji; class_id is the place in this list
CLASSES: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("scene_classes.yaml").read_text("utf-8"))
_WHITE = 6  # a ground pixel's largest distance from white in any channel
_SOFT = ImageFilter.BoxBlur(1)  # edge of a cut object


@functools.cache
def load_objects(folder: Path, classes: tuple[str, ...]) -> tuple[tuple[Image.Image, ...], ...]:
    """By class_id the cut images, RGBA, of the emoji shards in `folder`; a class is of CLASSES or a caption."""
    captions = [CLASSES.get(name, [name]) for name in classes]
    found = _images(folder, {caption for several in captions for caption in several})
    for name, several in zip(classes, captions, strict=True):
        missing = [caption for caption in several if caption not in found]
        if missing and name not in CLASSES:
            known = ", ".join(CLASSES)
            raise InputError(f"classes={name} is neither one of {known} nor a caption in {folder}; fix it.")
        if missing:
            raise InputError(
                f"emoji={folder} holds no image with the caption {missing[0]!r} of class {name}; "
                "give the shipped shards or other classes."
            )
    return tuple(tuple(found[caption] for caption in several) for several in captions)


def cut(image: Image.Image) -> Image.Image:
    """RGB over white => RGBA of the object alone: white that touches the edge is ground."""
    pixels = np.asarray(image.convert("RGB"))
    object_pixels = ~_ground(pixels.min(axis=2) >= 255 - _WHITE)
    alpha = Image.fromarray((object_pixels * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(3)).filter(_SOFT)
    whole = image.convert("RGB")
    whole.putalpha(alpha)
    return whole.crop(alpha.getbbox() or (0, 0, *alpha.size))


def _ground(white: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """White pixels (H, W) that a path of white pixels joins with the edge."""
    import cv2  # slow to import

    framed = np.pad(white, 1, constant_values=True).astype(np.uint8)
    labels = cv2.connectedComponents(framed, connectivity=4)[1]
    return (labels == labels[0, 0])[1:-1, 1:-1]


def _images(folder: Path, captions: set[str]) -> dict[str, Image.Image]:
    """Caption => cut image; of several images with one caption the first."""
    found: dict[str, Image.Image] = {}

    def take(key: str, data: bytes) -> None:
        _, files = parse_sample(data, key)
        caption, ending = json.loads(files.get("json", b"{}")).get("caption"), image_ending(files)
        if caption in captions and caption not in found and ending:
            found[caption] = cut(open_image(files[ending]))

    for shard in read_manifest(folder).shards:
        scan_tar(folder / shard.name, take)
    return found


Share = NDArray[np.floating[Any]]  # (H, W), of the second colour
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.33, "blue": 0.58, "purple": 0.77, "grey": None}


def background(rng: random.Random, size: int) -> tuple[NDArray[np.uint8], str]:
    """Pixels (size, size, 3), and what they are called: "blue stripes"."""
    pattern = rng.choice(sorted(PATTERNS))
    colour = rng.choice(sorted(HUES))
    light, dark = (np.array(_pale(HUES[colour], value, rng), np.float32) for value in (0.95, 0.72))
    share = PATTERNS[pattern](rng, size)
    grain = 24 * (_clouds(rng, size, 8) - 0.5)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):  # a plane at a time: numpy is slow over an innermost axis of three
        pixels[..., channel] = np.clip(light[channel] + (dark - light)[channel] * share + grain, 0, 255)
    return pixels, f"{colour} {pattern}"


def _pale(hue: float | None, value: float, rng: random.Random) -> list[float]:
    """RGB in 0 .. 255."""
    saturation = 0.0 if hue is None else rng.uniform(0.2, 0.45)
    shifted = ((hue or 0.0) + rng.uniform(-0.03, 0.03)) % 1
    return [255 * part for part in colorsys.hsv_to_rgb(shifted, saturation, value)]


def _clouds(rng: random.Random, size: int, cells: int) -> Share:
    """Smooth random values in 0 .. 1."""
    coarse = np.random.default_rng(rng.getrandbits(64)).integers(0, 256, (cells, cells), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32) / 255


def _waves(rng: random.Random, size: int) -> tuple[Share, Share]:
    """Two waves at right angles, in -1 .. 1, 3 to 7 periods an image."""
    angle, periods = rng.uniform(0, np.pi), rng.uniform(3, 7)
    steps = (np.arange(size) + 0.5) / size * (2 * np.pi * periods)
    along, across = np.cos(angle) * steps, np.sin(angle) * steps
    phases = rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)
    return _sine_of_sum(across, along + phases[0]), _sine_of_sum(along, phases[1] - across)


def _sine_of_sum(rows: Share, columns: Share) -> Share:
    """sin(rows[i] + columns[j]) in four sines a row and column."""
    return np.outer(np.sin(rows), np.cos(columns)) + np.outer(np.cos(rows), np.sin(columns))


def _edge(value: Share) -> Share:
    """The transition between two colours, about one pixel of 64 wide."""
    return np.clip(0.5 + value * 2.5, 0, 1).astype(np.float32)


def _gradient(rng: random.Random, size: int) -> Share:
    angle = rng.uniform(0, 2 * np.pi)
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    slope = np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None]
    return np.clip(0.5 + 0.8 * slope, 0, 1).astype(np.float32)


PATTERNS: dict[str, Callable[[random.Random, int], Share]] = {
    "checks": lambda rng, size: _edge(np.multiply(*_waves(rng, size))),
    "clouds": lambda rng, size: _clouds(rng, size, 5),
    "dots": lambda rng, size: _edge(np.add(*_waves(rng, size)) - 0.8),
    "gradient": _gradient,
    "stripes": lambda rng, size: _edge(_waves(rng, size)[0]),
}
