"""Tasks: conditioning inputs and target derived from an image; the defaults that they share."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor

Sample = dict[str, Any]


class BaseTask:
    """Uses every image, treats validation images like others and leaves generated images unchanged."""

    adds: ClassVar[frozenset[str]] = frozenset()

    @property
    def needs(self) -> frozenset[str]:
        """Stored parts that it starts from: image | mask | segmentation | boxes."""
        return frozenset({"image"})

    @property
    def held_out(self) -> "BaseTask":
        """The task for images that are compared."""
        return self

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
