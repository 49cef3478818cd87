"""Tasks: conditioning inputs and target derived from an image; the defaults that they share."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from ldmlab.tasks.crop import Crop

Sample = dict[str, Any]


class BaseTask:
    """Uses every image, cuts validation images in their middle and leaves generated images unchanged."""

    adds: ClassVar[frozenset[str]] = frozenset()
    stored: ClassVar[frozenset[str]] = frozenset()  # parts in addition to the image: mask | segmentation | boxes
    image_size: int  # px
    crop: Crop | None = None  # None: the centre square, as for stored latents

    @property
    def needs(self) -> frozenset[str]:
        """Stored parts that it starts from, the image where that is cropped: image | mask | segmentation | boxes."""
        return self.stored if self.crop is None else self.stored | {"image"}

    @property
    def held_out(self) -> Any:
        """The task for images that are compared."""
        return self if self.crop is None else replace(self, crop=self.crop.held_out)  # type: ignore[type-var]

    def cut(self, sample: Sample, random: Any) -> Sample:
        """What the crop changes, or without one the parts as they are stored."""
        parts = {name: sample[name] for name in self.stored}
        return parts if self.crop is None else self.crop(sample, self.image_size, random)

    @property
    def keeps(self) -> Callable[[Mapping[str, Any]], bool] | None:
        """Which images take part, by their KEY.json; None: all of them, which is then not read."""
        return None

    def give(self, sample: Sample, random: Any) -> Sample:
        """What changes or is added; arrays uint8 (3, H, W), (1, H, W), (H, W)."""
        raise NotImplementedError

    def finish(self, images: Tensor, batch: dict[str, Any]) -> Tensor:
        """Generated pixels (B, 3, H, W) in [-1, 1]."""
        return images
