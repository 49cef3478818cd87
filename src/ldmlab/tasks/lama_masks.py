"""Holes as LaMa draws them (Suvorov et al., WACV 2022, data generation): broad strokes, or a few boxes.

A mask is uint8 (H, W), 1 in the hole. Ranges hold both ends unless said otherwise.
"""

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from ldmlab.errors import InputError

Mask = NDArray[np.uint8]
_SEGMENTS = 5  # of a stroke at most
_THINNEST, _SHORTEST = 5, 10  # px
_FIRST_ANGLE = 0.01  # radians


@dataclass(frozen=True)
class Strokes:
    """Bent strokes of OpenCV's thick lines."""

    least: int  # strokes
    most: int  # one more can be drawn: the original adds 1 twice
    width: int  # px above the thinnest, not reached
    length: int  # px above the shortest, not reached
    angle: int = 4  # directions 0.01, 1.01, ... radians

    def draw(self, height: int, width: int, random: Any) -> Mask:
        """One mask."""
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
        """One mask."""
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
    """One kind per mask, boxes at `box_rate` per stroke mask."""

    size: int  # of the images it is made for, px
    strokes: Strokes
    rectangles: Rectangles | None = None
    box_rate: float = 0.0  # 0.3: three box masks for ten of strokes

    def draw(self, height: int, width: int, random: Any) -> Mask:
        """One mask."""
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
    """A preset by name."""
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
