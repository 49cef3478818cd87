"""Objects for scenes: emoji of image shards, cut from their white ground, in classes told apart at 64 pixels."""

import functools
import io
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from ldmlab.data.manifest import read_manifest
from ldmlab.data.tar_samples import IMAGE_ENDINGS, scan_tar
from ldmlab.errors import InputError

_CLOCKS = tuple(f"clock face {hour}" for hour in ("three oclock", "five oclock", "eight oclock", "ten-thirty"))
CLASSES: dict[str, tuple[str, ...]] = {  # name => captions of its images; class_id is the place in this list
    "apple": ("red apple",),
    "aubergine": ("aubergine",),
    "banana": ("banana",),
    "billiard ball": ("billiards",),
    "book": ("green book", "blue book", "orange book"),
    "butterfly": ("butterfly",),
    "car": ("automobile", "taxi", "police car"),
    "clock": _CLOCKS,
    "crab": ("crab",),
    "fish": ("fish",),
    "flower": ("cherry blossom", "hibiscus"),
    "fox": ("fox face",),
    "frog": ("frog face",),
    "globe": ("earth globe europe-africa", "earth globe americas"),
    "hamburger": ("hamburger",),
    "heart": ("heavy black heart",),
    "mushroom": ("mushroom",),
    "panda": ("panda face",),
    "penguin": ("penguin",),
    "present": ("wrapped present",),
    "rocket": ("rocket",),
    "smiley": ("winking face", "slightly smiling face", "smiling face with sunglasses"),
    "star": ("white medium star",),
    "tree": ("evergreen tree", "deciduous tree"),
}
_WHITE = 6  # a ground pixel's largest distance from white in any channel
_SOFT = ImageFilter.BoxBlur(1)  # edge of a cut object


@functools.cache
def load_objects(folder: Path, classes: tuple[str, ...]) -> tuple[tuple[Image.Image, ...], ...]:
    """By class_id the cut images, RGBA, of the emoji shards in `folder`; a class is of CLASSES or a caption."""
    captions = [CLASSES.get(name, (name,)) for name in classes]
    wanted = {caption for several in captions for caption in several}
    found = _images(folder, wanted)
    for name, several in zip(classes, captions, strict=True):
        missing = [caption for caption in several if caption not in found]
        if missing:
            known = ", ".join(CLASSES)
            raise InputError(
                f"classes={name} is neither one of {known} nor a caption in {folder}; mend it."
                if name not in CLASSES
                else f"emoji={folder} holds no image with the caption {missing[0]!r} of class {name}; "
                "give the shipped shards or other classes."
            )
    return tuple(tuple(found[caption] for caption in several) for several in captions)


def cut(image: Image.Image) -> Image.Image:
    """RGB over white => RGBA of the object alone: white that touches the border is ground."""
    pixels = np.asarray(image.convert("RGB"))
    object_pixels = ~_ground(pixels.min(axis=2) >= 255 - _WHITE)
    alpha = Image.fromarray((object_pixels * 255).astype(np.uint8)).filter(ImageFilter.MinFilter(3)).filter(_SOFT)
    whole = image.convert("RGB")
    whole.putalpha(alpha)
    return whole.crop(alpha.getbbox() or (0, 0, *alpha.size))


def _ground(white: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """White pixels (H, W) that a path of white pixels joins with the border."""
    inside = np.pad(white, 1, constant_values=True)
    reached = np.zeros_like(inside)
    reached[[0, -1]] = reached[:, [0, -1]] = True
    count = 0
    while count != (count := int(reached.sum())):
        for _ in range(8):
            grown = reached.copy()
            grown[1:] |= reached[:-1]
            grown[:-1] |= reached[1:]
            grown[:, 1:] |= reached[:, :-1]
            grown[:, :-1] |= reached[:, 1:]
            reached = grown & inside
    return reached[1:-1, 1:-1]


def _images(folder: Path, captions: set[str]) -> dict[str, Image.Image]:
    """Caption => cut image; of several images with one caption the first."""
    found: dict[str, Image.Image] = {}
    files: dict[str, dict[str, bytes]] = defaultdict(dict)

    def visit(key: str, ending: str, content: bytes) -> None:
        files[key][ending] = content

    for shard in read_manifest(folder).shards:
        files.clear()
        scan_tar(folder / shard.name, visit)
        for sample in files.values():
            caption = json.loads(sample.get("json", b"{}")).get("caption")
            ending = next((name for name in IMAGE_ENDINGS if name in sample), None)
            if caption in captions and caption not in found and ending:
                found[caption] = cut(Image.open(io.BytesIO(sample[ending])))
    return found
