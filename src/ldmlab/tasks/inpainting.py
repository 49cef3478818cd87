"""Inpainting: an image with a hole is given, the hole is asked for and the rest stays bit for bit."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float
from ldmlab.tasks.base import BaseTask, Sample
from ldmlab.tasks.crop import Crop, resized
from ldmlab.tasks.lama_masks import Mask, preset, square_with_hole

STORED = "stored"


class _Pasted(BaseTask):
    """What training and evaluation share: the mask, and known pixels put back."""

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
        """Generated inside the hole, given outside."""
        hole = batch["mask"].to(images.device) > 0  # (B, 1, H, W)
        return torch.where(hole, images.float(), to_float(batch["image"].to(images.device)))


@dataclass(frozen=True)
class Inpainting(_Pasted):
    """Training: a crop, then a mask drawn on it, or the mask that is stored with the image."""

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
    """LaMa's test images: the mask is drawn on the whole image, then both are cut to a square that has the hole.

    Of `candidates` masks those with too large a hole are dropped and one of the rest is drawn; an image with none
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
        """As in training; ValueError where no candidate serves."""
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
    """A preset's mask (height, width); for images of another size than the preset's it is drawn at that and resized.

    size: the short side, which the preset's number stands for.
    """
    kind = preset(name)
    if kind.size == size:
        return kind.draw(height, width, random)
    canvas = kind.draw(round(height * kind.size / size), round(width * kind.size / size), random)
    return nearest_to(canvas, height, width)


def nearest_to(mask: Mask, height: int, width: int) -> Mask:
    """A mask at another size, without new values."""
    rows = (np.arange(height) + 0.5) * mask.shape[0] / height
    columns = (np.arange(width) + 0.5) * mask.shape[1] / width
    return np.ascontiguousarray(mask[rows.astype(np.int64)[:, None], columns.astype(np.int64)])
