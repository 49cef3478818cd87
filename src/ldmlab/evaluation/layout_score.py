"""Does the asked object stand in the asked box? A classifier of crops, trained on real scenes, looks into each box."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.class_score import Labelled, class_verdicts, learned_classifier
from ldmlab.evaluation.task_evidence import Batches, Evidence, Fields, Verdict

_SIDE = 32  # px of a crop


@dataclass(frozen=True)
class LayoutJudge:
    """Balanced over classes: the mean of each class's share of boxes that show it."""

    steps: int = 600  # updates of the classifier
    batch_size: int = 64
    crops: int = 20_000  # boxes it learns from at most
    margin: float = 0.1  # of a box's sides, seen around it
    smallest: float = 5.0  # px; a box with a shorter side is not judged
    needs: ClassVar[frozenset[str]] = frozenset({"boxes"})

    def __call__(self, evidence: Evidence) -> Verdict:
        """Learn from the training split, then look at held-out images and at samples."""
        examples = self.collected(evidence.real("train", ()), self.crops)
        judge = learned_classifier(evidence, examples, self.steps, self.batch_size, "the judge of boxes learns")
        real = self.collected(evidence.real(evidence.reference, ()))
        samples = self._of_samples(evidence, evidence.asked)
        exchanged = self._of_samples(evidence, evidence.others())
        return class_verdicts(
            judge,
            real,
            samples,
            exchanged,
            measures="asked class found in the asked box",
            how=(
                f"A classifier of crops of {len(judge.categories)} classes that has seen only real training images "
                "looks into every box that was asked for; shares are balanced over classes."
            ),
            names=evidence.class_names,
        )

    def collected(self, batches: Batches, most: int | None = None) -> Labelled:
        """The boxes of images as crops uint8 (N, 3, 32, 32), with the class of each."""
        found: list[Tensor] = []
        labels: list[str] = []
        for batch in batches:
            for image, boxes in zip(batch["image"], batch["boxes"], strict=True):
                self._cut(image, boxes, found, labels)
            if most is not None and len(labels) >= most:
                break
        if not found:
            raise InputError(f"no box has sides of {self.smallest:g} px, so there is nothing to judge layouts by.")
        return torch.stack(found[:most]), labels[:most]

    def _of_samples(self, evidence: Evidence, asked: Sequence[Fields]) -> Labelled:
        batch = {"image": evidence.samples, "boxes": [one["boxes"] for one in asked]}
        return self.collected([batch])

    def _cut(self, image: Tensor, boxes: Sequence[dict[str, Any]], found: list[Tensor], labels: list[str]) -> None:
        height, width = image.shape[1:]
        for entry in boxes:
            x0, y0, x1, y1 = entry["box"]
            if min((x1 - x0) * width, (y1 - y0) * height) >= self.smallest:
                found.append(crop(image, entry["box"], self.margin))
                labels.append(str(entry["class_id"]))


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
