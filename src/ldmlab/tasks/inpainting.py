"""Inpainting: the model fills the hole of an image; the rest is kept bit for bit.

Masks as in LaMa (Suvorov et al., WACV 2022, data generation): broad strokes, or a few boxes.
"""

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float
from ldmlab.tasks import BaseTask, Sample
from ldmlab.tasks.crop import Crop, resized

STORED = "stored"
Mask = NDArray[np.uint8]  # (H, W), 1 in the hole


class _Pasted(BaseTask):
    """Common parts of training and evaluation: the mask, and known pixels put back."""

    adds: ClassVar[frozenset[str]] = frozenset({"mask"})
    masks: str

    @property
    def needs(self) -> frozenset[str]:
        """The image, and its mask where that is stored."""
        return frozenset({"image", "mask"} if self.masks == STORED else {"image"})

    def _checked(self, sample: Sample) -> Sample:
        """The sample as it came; ValueError for a stored mask without a hole."""
        if self.masks == STORED and not sample["mask"].any():
            raise ValueError("its mask has no hole")
        return sample

    def finish(self, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """Generated inside the hole, the input outside."""
        hole = batch["mask"].to(images.device) > 0  # (B, 1, H, W)
        return torch.where(hole, images.float(), to_float(batch["image"].to(images.device)))


@dataclass(frozen=True)
class Inpainting(_Pasted):
    """Training: a crop, then a random mask, or the mask that is stored with the image."""

    image_size: int  # px
    masks: str = "lama_training"  # a preset of lama_masks.py | stored: KEY.mask.png, white in the hole
    held_out_masks: str = "thick_256"  # a preset | stored
    crop: Crop = field(default_factory=lambda: Crop("window"))

    def __post_init__(self) -> None:
        for name in (self.masks, self.held_out_masks):
            if name != STORED:
                preset(name)

    @property
    def held_out(self) -> "LamaTest":
        """LaMa's evaluation rule."""
        return LamaTest(self.image_size, self.held_out_masks)

    def give(self, sample: Sample, random: Any) -> Sample:
        """image (3, H, W) and mask (1, H, W), uint8; 1 in the hole."""
        cut = self.crop(self._checked(sample), self.image_size, random)
        if self.masks != STORED:
            cut["mask"] = draw(self.masks, self.image_size, self.image_size, self.image_size, random)[None]
        return cut


@dataclass(frozen=True)
class LamaTest(_Pasted):
    """LaMa's test images: the mask is made for the full image, then both are cut to a square that contains the hole.

    Of `candidates` masks those with too large a hole are dropped and one of the rest is chosen; an image with none
    left is left out.
    """

    image_size: int  # px
    masks: str = "thick_512"  # a preset | stored
    candidates: int = 5
    largest_hole: float = 0.5  # share of the square

    def __post_init__(self) -> None:
        if self.masks != STORED:
            preset(self.masks)
        if self.candidates < 1 or not 0 < self.largest_hole <= 1:
            raise InputError(
                f"task.candidates={self.candidates} and task.largest_hole={self.largest_hole}: "
                "at least one candidate, and a share above 0 and up to 1, are needed."
            )

    def give(self, sample: Sample, random: Any) -> Sample:
        """As in training; ValueError where no candidate fits."""
        if self.masks == STORED:
            return Crop("centre")(self._checked(sample), self.image_size, random)
        height, width = sample["image"].shape[1:]
        scale = self.image_size / min(height, width)
        shape = round(height * scale), round(width * scale)
        found = []
        for _ in range(self.candidates):
            mask = draw(self.masks, *shape, self.image_size, random)
            left, top, side = square_with_hole(mask, random)
            square = mask[top : top + side, left : left + side]
            if square.mean() <= self.largest_hole:
                found.append((square, left, top))
        if not found:
            raise ValueError(f"none of {self.candidates} masks leaves {1 - self.largest_hole:.0%} of the image")
        square, left, top = random.choice(found)
        region = (left / scale, top / scale, (left + self.image_size) / scale, (top + self.image_size) / scale)
        inside = (region[0], region[1], min(region[2], width), min(region[3], height))
        return {"image": resized(sample["image"], self.image_size, inside, "bicubic"), "mask": square[None].copy()}


def draw(name: str, height: int, width: int, size: int, random: Any) -> Mask:
    """A preset's mask (height, width); where the short side `size` is not the preset's it is made there and resized."""
    kind = preset(name)
    if kind.size == size:
        return kind.draw(height, width, random)
    mask = kind.draw(round(height * kind.size / size), round(width * kind.size / size), random)
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    return np.ascontiguousarray(mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)])  # no new values


# ---- holes as LaMa draws them; ranges include both ends unless noted

_SEGMENTS = 5  # of a stroke at most
_THINNEST, _SHORTEST = 5, 10  # px
_FIRST_ANGLE = 0.01  # radians


@dataclass(frozen=True)
class Strokes:
    """Bent strokes of OpenCV's thick lines."""

    least: int  # strokes
    most: int  # one more is possible: the original adds 1 twice
    width: int  # px above the thinnest, not reached
    length: int  # px above the shortest, not reached
    angle: int = 4  # directions 0.01, 1.01, ... radians

    def draw(self, height: int, width: int, random: Any) -> Mask:
        mask = np.zeros((height, width), np.uint8)
        for stroke in range(random.randint(self.least, self.most + 1)):
            x, y = random.randrange(width), random.randrange(height)
            for _ in range(random.randint(1, _SEGMENTS)):
                angle = _FIRST_ANGLE + random.randrange(self.angle)
                if stroke % 2 == 0:
                    angle = 2 * math.pi - angle
                length, thickness = _SHORTEST + random.randrange(self.length), _THINNEST + random.randrange(self.width)
                end_x = min(max(int(x + length * math.sin(angle)), 0), width)
                end_y = min(max(int(y + length * math.cos(angle)), 0), height)
                cv2.line(mask, (x, y), (end_x, end_y), 1, thickness)
                x, y = end_x, end_y
        return mask


@dataclass(frozen=True)
class Rectangles:
    """Boxes that may overlap."""

    least: int
    most: int
    smallest: int  # side, px
    largest: int  # side, px, not reached
    margin: int = 0  # px to the image's edge

    def draw(self, height: int, width: int, random: Any) -> Mask:
        largest = min(self.largest, height - 2 * self.margin, width - 2 * self.margin)
        if largest <= self.smallest:
            raise InputError(
                f"task.masks: boxes of {self.smallest} px and more do not fit into {width} x {height} px; "
                "choose the preset of a smaller size, or larger images."
            )
        mask = np.zeros((height, width), np.uint8)
        for _ in range(random.randint(self.least, self.most)):
            wide, high = random.randrange(self.smallest, largest), random.randrange(self.smallest, largest)
            left = random.randint(self.margin, width - self.margin - wide)
            top = random.randint(self.margin, height - self.margin - high)
            mask[top : top + high, left : left + wide] = 1
        return mask


@dataclass(frozen=True)
class MaskKind:
    """One kind a mask, boxes at `box_rate` a mask of strokes."""

    size: int  # of the images it is made for, px
    strokes: Strokes
    rectangles: Rectangles | None = None
    box_rate: float = 0.0  # 0.3: three box masks for ten of strokes

    def draw(self, height: int, width: int, random: Any) -> Mask:
        if self.rectangles is not None and random.random() < self.box_rate / (1 + self.box_rate):
            return self.rectangles.draw(height, width, random)
        return self.strokes.draw(height, width, random)


PRESETS = {
    "thin_256": MaskKind(256, Strokes(4, 50, width=10, length=40)),
    "medium_256": MaskKind(256, Strokes(4, 5, width=50, length=100), Rectangles(1, 5, 10, 50), 0.3),
    "thick_256": MaskKind(256, Strokes(1, 5, width=100, length=200), Rectangles(1, 3, 30, 150, margin=10), 0.3),
    "thin_512": MaskKind(512, Strokes(4, 70, width=20, length=100)),
    "medium_512": MaskKind(512, Strokes(4, 10, width=100, length=200), Rectangles(1, 5, 30, 150), 0.3),
    "thick_512": MaskKind(512, Strokes(1, 5, width=250, length=450), Rectangles(1, 4, 30, 300, margin=10), 0.3),
    # what LaMa itself trains on, at 256 px
    "lama_training": MaskKind(256, Strokes(1, 5, width=100, length=200), Rectangles(1, 4, 30, 150, margin=10), 1.0),
}


def preset(name: str) -> MaskKind:
    if name not in PRESETS:
        raise InputError(f"task.masks={name} is unknown; choose stored or one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def square_with_hole(mask: Mask, random: Any) -> tuple[int, int, int]:
    """LaMa's square of the short side (left, top, side), slid along the long side; it holds the hole's far edge."""
    height, width = mask.shape
    side = min(height, width)
    if height == width:
        return 0, 0, side
    along = np.flatnonzero(mask.any(axis=0 if width > height else 1))
    far, free = (int(along[-1]) if len(along) else 0), abs(width - height)
    lowest = max(0, min(free - 1, far - side))
    highest = max(lowest + 1, min(free, far))  # not reached
    start = random.randrange(lowest, highest)
    return (start, 0, side) if width > height else (0, start, side)
