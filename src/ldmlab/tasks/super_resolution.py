"""Super-resolution: from a low-resolution image to a high-resolution one."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from ldmlab.errors import InputError, one_of
from ldmlab.tasks import BaseTask, Sample
from ldmlab.tasks.crop import Crop
from ldmlab.tasks.degradation import LIGHT, Bsr

_BLIND = {"bsr": Bsr(), "bsr_light": LIGHT}
DEGRADATIONS = ("bicubic", *_BLIND)


@dataclass(frozen=True)
class SuperResolution(BaseTask):
    """Large: the crop; small: antialiased bicubic of it (the paper, E.3.4; Pillow's, the paper names no library).

    With a blind degradation it is blurred, noised and compressed too, anew at each access.
    """

    image_size: int  # of the large image, px
    factor: int = 4  # large side / small side
    degradation: str = "bicubic"  # bicubic | bsr | bsr_light, as the paper's released model
    crop: Crop = field(default_factory=lambda: Crop("centre", filter="area"))  # as SR3: largest square, area means
    adds: ClassVar[frozenset[str]] = frozenset({"low_resolution"})

    def __post_init__(self) -> None:
        one_of("task.degradation", self.degradation, DEGRADATIONS)
        if self.factor < 2 or self.image_size % self.factor:
            raise InputError(
                f"task.factor={self.factor} does not divide data.image_size={self.image_size}; "
                "choose a divisor above 1, or another size."
            )

    def give(self, sample: Sample, random: Any) -> Sample:
        """image (3, H, W) and low_resolution (3, H / factor, W / factor), uint8."""
        cut = self.cut(sample, random)
        if self.degradation in _BLIND:
            return {**cut, "low_resolution": _BLIND[self.degradation](cut["image"], self.factor, random)}
        side = self.image_size // self.factor  # Pillow's bicubic kernel, widened by the factor
        small = Image.fromarray(cut["image"].transpose(1, 2, 0)).resize((side, side), Image.Resampling.BICUBIC)
        return {**cut, "low_resolution": np.ascontiguousarray(np.asarray(small).transpose(2, 0, 1))}
