"""Do samples show the label map that was asked for? A segmenter trained on real images draws their maps again.

Foreground mIoU: the mean over classes but the background (0) of the intersection over the union of asked and found
pixels, both counted over all images; classes that nobody asked for are left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.class_score import class_name
from ldmlab.evaluation.segmenter import seen, seen_labels, train_segmenter
from ldmlab.evaluation.task_evidence import Batches, ClassVerdict, Evidence, Fields, Verdict
from ldmlab.nn.pixels import to_bytes

_LARGEST = 256  # classes


@dataclass(frozen=True)
class SemanticJudge:
    """Foreground mIoU of a segmenter against the maps that were asked for."""

    steps: int = 400  # updates of the segmenter
    batch_size: int = 24
    images: int = 4000  # it learns from at most
    needs: ClassVar[frozenset[str]] = frozenset({"segmentation"})

    def __call__(self, evidence: Evidence) -> Verdict:
        """Learn from the training split, then look at held-out images and at samples."""
        images, labels = collected(evidence.real("train", ()), self.images)
        judge = train_segmenter(
            images,
            labels,
            int(labels.max()) + 1,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=evidence.seed,
            show=evidence.shown("the judge of label maps learns"),
        )
        held_out, held_out_labels = collected(evidence.real(evidence.reference, ()))
        real = overlaps(judge.predict(held_out), held_out_labels, judge.classes)
        found = judge.predict(evidence.samples)
        samples, exchanged = (
            overlaps(found, asked_maps(part), judge.classes) for part in (evidence.asked, evidence.others())
        )
        rows = zip(range(1, judge.classes), real[1:], samples[1:], strict=True)
        return Verdict(
            measures="foreground mIoU with the asked map",
            how=(
                f"A segmenter of {judge.classes - 1} classes and background that has seen only real training images "
                "draws the map of every sample again; intersection over union, mean over classes without background."
            ),
            samples=mean_iou(samples),
            held_out_real=mean_iou(real),
            shuffled=mean_iou(exchanged),
            chance=None,
            classes=[
                ClassVerdict(_name(n, judge.classes, evidence.class_names), r.iou, r.asked, s.iou, s.asked)
                for n, r, s in rows
            ],
            learned=judge.learned,
        )


def _name(label: int, labels: int, names: Sequence[str]) -> str:
    """Of a label; labels are class numbers moved up by the background where the data name just those."""
    return class_name(label - 1, names) if len(names) == labels - 1 else f"label {label}"


@dataclass(frozen=True)
class Overlap:
    """Pixels of a class over all images."""

    both: int
    asked: int
    found: int

    @property
    def iou(self) -> float | None:
        """None where nobody asked for it."""
        return self.both / (self.asked + self.found - self.both) if self.asked else None


def overlaps(found: Tensor, asked: Tensor, classes: int) -> list[Overlap]:
    """Maps (N, h, w) of both kinds; a class that the judge has never seen cannot be judged."""
    if int(asked.max()) >= classes:
        raise InputError(
            f"label {int(asked.max())} is asked for but in no training image, so it cannot be judged; "
            "pack the data with another split."
        )
    asked, found = asked.flatten().to(torch.int64), found.flatten().to(torch.int64)
    both = torch.bincount(asked[asked == found], minlength=classes).tolist()
    counts = [torch.bincount(labels, minlength=classes).tolist() for labels in (asked, found)]
    return [Overlap(*one) for one in zip(both, *counts, strict=True)]


def mean_iou(found: Sequence[Overlap]) -> float:
    """Over classes that are asked for, without the background."""
    values = [one.iou for one in found[1:] if one.iou is not None]
    if not values:
        raise InputError("no label map asks for anything but background, so there is nothing to judge them by.")
    return sum(values) / len(values)


def asked_maps(asked: Sequence[Fields]) -> Tensor:
    """Label maps of requests, int64 (N, 64, 64)."""
    return torch.cat([seen_labels(torch.as_tensor(one["segmentation"]).long()[None]) for one in asked])


def collected(batches: Batches, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and label maps uint8 (N, 64, 64)."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        if len(batch["key"]):
            images.append(to_bytes(seen(batch["image"])))
            labels.append(seen_labels(batch["segmentation"]))
        if most is not None and sum(map(len, images)) >= most:
            break
    if not images:
        raise InputError("no image with a label map could be read to learn from.")
    maps = torch.cat(labels)[:most]
    if int(maps.max()) >= _LARGEST:
        raise InputError(f"label {int(maps.max())} is above 255, which this judge does not serve; renumber the maps.")
    return torch.cat(images)[:most], maps.to(torch.uint8)
