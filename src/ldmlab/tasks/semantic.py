"""Semantic synthesis: the input is a map of class numbers."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ldmlab.tasks import BaseTask, Sample
from ldmlab.tasks.crop import Crop


@dataclass(frozen=True)
class Semantic(BaseTask):
    """Image and label map cut alike; labels outside the classes make a bad sample."""

    image_size: int  # px
    classes: int = 182  # class numbers are 0 .. classes - 1
    unlabelled: int | None = None  # stored number of pixels without label: they become the last class
    crop: Crop | None = None  # None: the centre square, as for stored latents
    adds: ClassVar[frozenset[str]] = frozenset({"segmentation"})
    stored = adds

    def give(self, sample: Sample, random: Any) -> Sample:
        """segmentation (H, W) of class numbers, and the image if it is cropped."""
        cut = self.cut(sample, random)
        labels = cut["segmentation"]
        if self.unlabelled is not None:  # others stay as they are, so that stored maps can be used
            labels = np.where(labels == self.unlabelled, self.classes - 1, labels.astype(np.int64))
        if labels.max(initial=0) >= self.classes:
            raise ValueError(f"label {labels.max()} in a map of {self.classes} classes (task.classes)")
        return {**cut, "segmentation": labels.astype(np.uint8 if self.classes <= 256 else np.int64)}
