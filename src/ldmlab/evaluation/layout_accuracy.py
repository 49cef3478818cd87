"""Layout accuracy: a classifier of crops, trained on real scenes, classifies the content of each box."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.evaluators import Accuracy, Batches, Evidence, Labelled, classified, others, trained

_SIDE = 32  # px of a crop


@dataclass(frozen=True)
class LayoutAccuracy:
    """Fraction of boxes that show their class, balanced over classes."""

    steps: int = 600  # updates of the classifier
    batch_size: int = 64
    crops: int = 20_000  # largest number of training boxes
    margin: float = 0.1  # of a box's sides, seen around it
    smallest: float = 5.0  # px; a box with a shorter side is left out
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    def __call__(self, evidence: Evidence) -> Accuracy:
        """Train on the training split, then classify the boxes of validation images and of samples."""
        examples = self.collected(evidence.real("train", ()), self.crops)
        classifier = trained(evidence, examples, self.steps, self.batch_size, "boxes")
        samples, exchanged = (
            self.collected([{"image": evidence.samples, "boxes": [one["boxes"] for one in conditions]}])
            for conditions in (evidence.conditions, others(evidence.conditions, evidence.seed))
        )
        return classified(
            classifier,
            evidence,
            self.collected(evidence.real(evidence.reference, ())),
            samples,
            exchanged,
            measures="boxes classified as the class of their condition",
            how=(
                f"A classifier of crops of {len(classifier.classes)} classes, trained on real training images alone, "
                "classifies the content of every box; fractions are balanced over classes."
            ),
        )

    def collected(self, batches: Batches, most: int | None = None) -> Labelled:
        """The boxes of images as crops uint8 (N, 3, 32, 32), with the class of each."""
        found: list[Tensor] = []
        labels: list[str] = []
        for batch in batches:
            for image, boxes in zip(batch["image"], batch["boxes"], strict=True):
                height, width = image.shape[1:]
                for entry in boxes:
                    x0, y0, x1, y1 = entry["box"]
                    if min((x1 - x0) * width, (y1 - y0) * height) >= self.smallest:
                        found.append(crop(image, entry["box"], self.margin))
                        labels.append(str(entry["class_id"]))
            if most is not None and len(labels) >= most:
                break
        if not found:
            raise InputError(f"no box has sides of {self.smallest:g} px, so there is nothing to measure layouts by.")
        return torch.stack(found[:most]), labels[:most]


def crop(image: Tensor, box: Sequence[float], margin: float = 0.0, side: int = _SIDE) -> Tensor:
    """The box [x0, y0, x1, y1] (0 .. 1) of an image uint8 (3, H, W), with a margin => (3, side, side)."""
    height, width = image.shape[1:]
    extra_x, extra_y = margin * (box[2] - box[0]), margin * (box[3] - box[1])
    left, right = _span((box[0] - extra_x) * width, (box[2] + extra_x) * width, width)
    top, bottom = _span((box[1] - extra_y) * height, (box[3] + extra_y) * height, height)
    cut = image[None, :, top:bottom, left:right].float()
    resized = F.interpolate(cut, (side, side), mode="bilinear", antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def _span(low: float, high: float, size: int) -> tuple[int, int]:
    """Whole pixels inside the image, one at least."""
    first = min(max(round(low), 0), size - 1)
    return first, min(max(round(high), first + 1), size)
