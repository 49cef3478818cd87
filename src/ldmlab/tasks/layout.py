"""Layout to image: the inputs are boxes with classes."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ldmlab.annotations import WHOLE, Boxes, area, checked
from ldmlab.errors import InputError
from ldmlab.tasks import BaseTask, Sample
from ldmlab.tasks.crop import Crop


@dataclass(frozen=True)
class Layout(BaseTask):
    """Boxes above a smallest area, images with a number of them in a range; the order of objects is random."""

    image_size: int  # px
    least: int = 2  # objects an image
    most: int = 30  # objects an image
    smallest_area: float = 0.0001  # of a box, as a share of the stored image
    shuffle: bool = True  # a new order of the objects at each access
    crop: Crop | None = None  # None: the centre square, as for stored latents
    classes: int | None = None  # of boxes, numbered from 0; None: any number
    adds: ClassVar[frozenset[str]] = frozenset({"boxes", "crop"})
    stored: ClassVar[frozenset[str]] = frozenset({"boxes"})

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise InputError(f"task.least={self.least} and task.most={self.most} are no range; swap them.")

    @property
    def keeps(self) -> Callable[[Mapping[str, Any]], bool]:
        """Images with enough objects, and not too many."""
        return lambda fields: self.least <= len(self._large(checked(fields.get("boxes", [])))) <= self.most

    def give(self, sample: Sample, random: Any) -> Sample:
        """boxes relative to the crop, and the crop in the stored image; ValueError for a box of no known class."""
        known = range(sys.maxsize if self.classes is None else self.classes)
        for entry in sample["boxes"]:
            if entry["class_id"] not in known:
                raise ValueError(f"class_id {entry['class_id']} of a box is not 0 .. {known[-1]} (task.classes)")
        cut = self.cut({**sample, "boxes": self._large(sample["boxes"])}, random)
        if self.shuffle:
            cut["boxes"] = random.sample(cut["boxes"], len(cut["boxes"]))
        return {"crop": sample.get("crop", list(WHOLE)), **cut}

    def _large(self, boxes: Boxes) -> Boxes:
        return [entry for entry in boxes if area(entry["box"]) >= self.smallest_area]
