"""Variations: from an image to another one with the same content."""

from dataclasses import dataclass
from typing import Any, ClassVar

from ldmlab.errors import InputError
from ldmlab.tasks import BaseTask, Sample
from ldmlab.tasks.crop import Crop


@dataclass(frozen=True)
class Variations(BaseTask):
    """In training the reference is the image itself, as cropped."""

    image_size: int  # px
    crop: Crop | None = None  # None: the middle square
    adds: ClassVar[frozenset[str]] = frozenset({"reference"})

    def give(self, sample: Sample, random: Any) -> Sample:
        """reference: the same uint8 (3, H, W) as the image."""
        if "image" not in sample:
            raise InputError(
                "task=variations needs images, which data.latents does not hold; encode them with "
                "conditioner=image, or set data.latents=null and give the first stage as from_run=RUN."
            )
        cut = self.cut(sample, random)
        return {**cut, "reference": cut.get("image", sample["image"])}
