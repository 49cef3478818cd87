"""Made-up scenes: emoji on textured backgrounds with their boxes, label maps and captions, in image shards.

A scene is a function of (seed, its key) alone, so shards have the same bytes for any number of workers.
"""

import io
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ldmlab.annotations import Box, Boxes, area
from ldmlab.data.image_sources import Item, Source
from ldmlab.data.manifest import Manifest
from ldmlab.data.order import image_random
from ldmlab.data.pack_images import Encoding, Part
from ldmlab.data.pack_shards import PackOptions, Progress, pack
from ldmlab.data.scene_parts import CLASSES, background, load_objects
from ldmlab.data.shards import tar_bytes
from ldmlab.data.splits import SplitRule
from ldmlab.data.transforms import Transform
from ldmlab.errors import InputError

MOST = 5  # objects
_SIDES = {1: (0.45, 0.7), 2: (0.36, 0.55), 3: (0.32, 0.46), 4: (0.3, 0.42), 5: (0.28, 0.38)}  # long side, by objects
_OVERLAP = 0.2  # of two boxes, share of the smaller one, at most
_TRIES = 20  # places tried for an object before it is left out
_SOLID = 128  # alpha from which a pixel is the object's


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
        shape = _sized(rng.choice(objects[class_id]), rng.uniform(*_SIDES[count]) * settings.size)
        place = _place(rng, shape.size, settings.size, [entry["box"] for entry in boxes])
        if place is None:
            continue
        corner = (round(place[0] * settings.size), round(place[1] * settings.size))
        image.paste(shape, corner, shape)
        labels.paste(class_id + 1, corner, shape.getchannel("A").point(lambda alpha: 255 * (alpha >= _SOLID)))
        boxes.append({"class_id": class_id, "box": place})
    return Scene(image, labels, boxes, _caption([settings.classes[entry["class_id"]] for entry in boxes], ground))


def _sized(image: Image.Image, side: float) -> Image.Image:
    """The image with its long side at `side` px."""
    factor = side / max(image.size)
    width, height = (max(round(length * factor), 2) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)


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


def _caption(names: list[str], ground: str) -> str:
    """ "a fox, two frogs" would need grammar: every object is named by itself."""
    spoken = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
    listed = " and ".join([", ".join(spoken[:-1]), spoken[-1]] if len(spoken) > 1 else spoken)
    return f"{listed} on {ground}"


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
