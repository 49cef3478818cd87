"""Made-up scenes: emoji on textured backgrounds with their boxes, label maps and captions, in image shards.

A scene is a function of (seed, its key) alone, so shards have the same bytes for any number of workers.
"""

import colorsys
import functools
import io
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ldmlab.annotations import Box, Boxes, area
from ldmlab.data.image_sources import Item, Source
from ldmlab.data.manifest import Manifest, read_manifest
from ldmlab.data.order import image_random
from ldmlab.data.pack_images import Encoding, Part
from ldmlab.data.pack_shards import PackOptions, Progress, pack
from ldmlab.data.splits import SplitRule
from ldmlab.data.tars import image_ending, parse_sample, scan_tar, tar_bytes
from ldmlab.data.transforms import Transform
from ldmlab.errors import InputError
from ldmlab.open_image import open_image

# name => captions of its images among the emoji; class_id is the place in this list
CLASSES: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("scene_classes.yaml").read_text("utf-8"))
MOST = 5  # objects
_SIDES = {1: (0.45, 0.7), 2: (0.36, 0.55), 3: (0.32, 0.46), 4: (0.3, 0.42), 5: (0.28, 0.38)}  # long side, by objects
_OVERLAP = 0.2  # of two boxes, share of the smaller one, at most
_TRIES = 20  # places tried for an object before it is left out
_SOLID = 128  # alpha from which a pixel is the object's
_WHITE = 6  # a ground pixel's largest distance from white in any channel
_SOFT = ImageFilter.BoxBlur(1)  # edge of a cut object


@dataclass(frozen=True)
class SceneSettings:
    """All settings of the scenes except the emoji images themselves."""

    emoji: str  # folder of image shards
    size: int = 64  # px
    seed: int = 0
    classes: tuple[str, ...] = tuple(CLASSES)
    least: int = 1  # objects
    most: int = MOST

    def __post_init__(self) -> None:
        if self.size < 16:
            raise InputError(f"size={self.size} px is too small to see an object; give at least 16.")
        if not 1 <= self.least <= self.most <= MOST:
            raise InputError(f"objects={self.least} to {self.most}; choose within 1 .. {MOST}.")
        if not self.classes or len(set(self.classes)) < len(self.classes):
            raise InputError(f"classes={','.join(self.classes)}: name every class once, at least one.")


@dataclass(frozen=True)
class Scene:
    """An image and what lies on it; labels are 0 on the background and 1 + class_id on an object."""

    image: Image.Image
    labels: Image.Image
    boxes: Boxes
    caption: str


@functools.cache
def load_objects(folder: Path, classes: tuple[str, ...]) -> tuple[tuple[Image.Image, ...], ...]:
    """By class_id the cut images, RGBA, of the emoji shards in `folder`; a class is of CLASSES or a caption."""
    captions = [CLASSES.get(name, [name]) for name in classes]
    found: dict[str, Image.Image] = {}  # of several images with one caption the first

    def take(key: str, data: bytes) -> None:
        _, files = parse_sample(data, key)
        caption, ending = json.loads(files.get("json", b"{}")).get("caption"), image_ending(files)
        if any(caption in several for several in captions) and caption not in found and ending:
            found[caption] = cut(open_image(files[ending]))

    for shard in read_manifest(folder).shards:
        scan_tar(folder / shard.name, take)
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
    """RGB over white => RGBA of the object alone: white that touches the edge, through white, is ground."""
    import cv2  # slow to import

    whole = image.convert("RGB")
    framed = np.pad(np.asarray(whole).min(axis=2) >= 255 - _WHITE, 1, constant_values=True).astype(np.uint8)
    labels = cv2.connectedComponents(framed, connectivity=4)[1]
    object_pixels = (labels != labels[0, 0])[1:-1, 1:-1]
    alpha = Image.fromarray((object_pixels * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(3)).filter(_SOFT)
    whole.putalpha(alpha)
    return whole.crop(alpha.getbbox() or (0, 0, *alpha.size))


def draw_scene(settings: SceneSettings, key: str) -> Scene:
    """The scene of this key; the boxes are in the order of drawing, later objects over earlier ones."""
    rng = image_random(settings.seed, 0, key)
    objects = load_objects(Path(settings.emoji), settings.classes)
    pixels, ground = background(rng, settings.size)
    image = Image.fromarray(pixels)
    labels = Image.new("L" if len(objects) < 256 else "I;16", image.size, 0)
    boxes: Boxes = []
    count = rng.randint(settings.least, settings.most)
    for _ in range(count):
        class_id = rng.randrange(len(objects))
        shape = rng.choice(objects[class_id])
        factor = rng.uniform(*_SIDES[count]) * settings.size / max(shape.size)  # long side at that
        sides = max(round(shape.width * factor), 2), max(round(shape.height * factor), 2)
        shape = shape.resize(sides, Image.Resampling.BICUBIC, reducing_gap=2.0)
        place = _place(rng, shape.size, settings.size, [entry["box"] for entry in boxes])
        if place is None:
            continue
        corner = (round(place[0] * settings.size), round(place[1] * settings.size))
        image.paste(shape, corner, shape)
        labels.paste(class_id + 1, corner, shape.getchannel("A").point(lambda alpha: 255 * (alpha >= _SOLID)))
        boxes.append({"class_id": class_id, "box": place})
    names = [settings.classes[entry["class_id"]] for entry in boxes]
    spoken = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]  # "two frogs" would need grammar
    listed = " and ".join([", ".join(spoken[:-1]), spoken[-1]] if len(spoken) > 1 else spoken)
    return Scene(image, labels, boxes, f"{listed} on {ground}")


def _place(rng: random.Random, shape: tuple[int, int], size: int, taken: Sequence[Box]) -> Box | None:
    """A box for an object of `shape` px that hides little of the others; None if none was found."""
    width, height = shape
    for _ in range(_TRIES):
        left, top = rng.randint(0, size - width), rng.randint(0, size - height)
        box = [left / size, top / size, (left + width) / size, (top + height) / size]
        if all(_shared(box, other) <= _OVERLAP * min(area(box), area(other)) for other in taken):
            return box
    return None


def _shared(first: Box, second: Box) -> float:
    """Area that two boxes have in common."""
    sides = [min(first[axis + 2], second[axis + 2]) - max(first[axis], second[axis]) for axis in (0, 1)]
    return max(sides[0], 0.0) * max(sides[1], 0.0)


def scene_part(items: Sequence[Item], settings: SceneSettings, encoding: Encoding) -> Part:
    """Some scenes as tar bytes, generated where images would be read."""
    data, offsets = bytearray(), []
    for item in items:
        scene = draw_scene(settings, item.key)
        fields: dict[str, Any] = {"caption": scene.caption, "boxes": scene.boxes}
        labels = io.BytesIO()
        scene.labels.save(labels, "PNG")
        offsets.append(len(data))
        data += tar_bytes(f"{item.key}.{encoding.format}", encoding(scene.image))
        data += tar_bytes(f"{item.key}.json", json.dumps(fields, ensure_ascii=False).encode())
        data += tar_bytes(f"{item.key}.seg.png", labels.getvalue())
    return Part(bytes(data), offsets, ["caption", "boxes"])


def write_scenes(
    out: Path,
    counts: dict[str, int],  # scenes by split
    settings: SceneSettings,
    *,
    encoding: Encoding | None = None,
    shard_size: int = 1000,
    workers: int | None = None,  # None: all cores
    progress: Progress | None = None,
) -> dict[str, Manifest]:
    """OUT/SPLIT with shards and manifest, as `pack` writes them; no scene is in two splits."""
    load_objects(Path(settings.emoji), settings.classes)  # a wrong class ends here
    options = PackOptions(Transform(settings.size), encoding or Encoding(), shard_size=shard_size)
    fields = {name: value for name, value in asdict(settings).items() if name != "emoji"}
    manifests: dict[str, Manifest] = {}
    for split, count in counts.items():
        items = [Item(f"{split}-{number:07d}", f"scene {number}", "", fields) for number in range(count)]
        result = pack(
            Source("scenes", items, list(settings.classes)),
            out,
            replace(options, split=SplitRule(name=split)),
            origin=f"scenes of {Path(settings.emoji).name}, seed {settings.seed}",
            licence="as the emoji",
            workers=workers,
            progress=progress,
            encode=partial(scene_part, settings=settings, encoding=options.encoding),
        )
        manifests |= result.manifests
    return manifests


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
