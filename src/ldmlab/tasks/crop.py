"""The square crop of a stored image in training, applied to maps and boxes too.

Origins: `window` and `random` as the loaders of taming-transformers cut (sides of fixed or of random length), `centre`
their validation rule; `area` averages the pixels that a target pixel covers, as in SR3.
"""

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.annotations import WHOLE, Box, cropped, nearest, within
from ldmlab.errors import InputError, one_of

cv2.setNumThreads(1)  # loader workers already share the cores
Region = tuple[float, float, float, float]  # left, top, right, bottom in px


@dataclass(frozen=True)
class Crop:
    """One square, resized to the target size.

    centre, window: the image's short side is brought to `short_side` and the square has the target size; it lies
    in the middle or anywhere. random: a random side between `smallest` and the short side, anywhere.
    """

    rule: str = "centre"  # centre | window | random
    short_side: int | None = None  # centre, window: of the resized image, px; None: the target size
    smallest: float | None = None  # random: share of the short side; None: the target size, px
    filter: str = "bicubic"  # bicubic (antialiased) | area

    def __post_init__(self) -> None:
        one_of("task.crop.rule", self.rule, ("centre", "window", "random"))
        one_of("task.crop.filter", self.filter, ("bicubic", "area"))
        if self.short_side is not None and self.rule == "random":
            raise InputError(f"task.crop.short_side={self.short_side} has no meaning for rule=random; leave it out.")
        if self.smallest is not None and (self.rule != "random" or not 0 < self.smallest <= 1):
            raise InputError(f"task.crop.smallest={self.smallest} is for rule=random, in (0, 1]; fix or leave it out.")

    @property
    def held_out(self) -> "Crop":
        """The same for images that are compared: in the middle."""
        return replace(self, rule="centre", smallest=None)

    def box(self, width: int, height: int, size: int, random: Any) -> tuple[float, float, float]:
        """Left, top and side in pixels of the stored image."""
        short = min(width, height)
        if self.rule != "random":
            side = short * size / (self.short_side or size)
            if side > short:
                raise InputError(f"task.crop.short_side={self.short_side} is less than the size {size}; raise it.")
            if self.rule == "centre":
                return (width - round(side)) // 2, (height - round(side)) // 2, side
            return random.uniform(0, width - side), random.uniform(0, height - side), side
        lowest = min(size, short) if self.smallest is None else max(round(self.smallest * short), 1)
        side = random.randint(lowest, short)
        return random.randint(0, width - side), random.randint(0, height - side), side

    def __call__(self, sample: dict[str, Any], size: int, random: Any) -> dict[str, Any]:
        """The sample's image, label map, stored mask and boxes in the crop, and the `crop` itself as a box."""
        height, width = sample["image"].shape[1:]
        left, top, side = self.box(width, height, size, random)
        place: Box = [left / width, top / height, (left + side) / width, (top + side) / height]
        region = (left, top, left + side, top + side)
        cut: dict[str, Any] = {"image": resized(sample["image"], size, region, self.filter)}
        for name in ("segmentation", "mask"):
            if name in sample:
                high, wide = sample[name].shape[-2:]
                if (high, wide) != (height, width):
                    raise ValueError(f"its {name} has {wide} x {high} pixels, the image {width} x {height}")
                cut[name] = nearest(sample[name], size, place)
        if "boxes" in sample:
            cut["boxes"] = cropped(sample["boxes"], place)
            cut["crop"] = within(place, sample.get("crop", WHOLE))
        return cut


def resized(image: NDArray[np.uint8], size: int, region: Region, filter: str) -> NDArray[np.uint8]:
    """The region of an image (3, H, W) at size x size."""
    pixels = np.ascontiguousarray(image.transpose(1, 2, 0))  # (H, W, 3)
    if filter == "area":
        left, top, right, bottom = (round(edge) for edge in region)
        result = cv2.resize(pixels[top:bottom, left:right], (size, size), interpolation=cv2.INTER_AREA)
    elif region == (0, 0, size, size) == (0, 0, *pixels.shape[1::-1]):
        return image
    else:
        whole = Image.fromarray(pixels)
        result = np.asarray(whole.resize((size, size), Image.Resampling.BICUBIC, box=region))
    return np.ascontiguousarray(result.transpose(2, 0, 1))
