"""Segmentation accuracy: a segmenter trained on real images predicts the label maps of samples.

Foreground mIoU: the mean over classes but the background (0) of the intersection over the union of input and predicted
pixels, both counted over all images; classes that are in no input map are left out. The segmenter sees 64 x 64 px,
whatever the images' size; label maps follow by nearest pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.evaluation.classifier import ByClass, Learned, Show, descend, own_random_numbers
from ldmlab.evaluation.evaluators import Accuracy, Batches, Evidence, class_name, others
from ldmlab.nn.pixels import to_bytes, to_float

SIDE = 64  # px
_LARGEST = 256  # classes


class Segmenter(nn.Module):
    """Float images (B, 3, 64, 64) in [-1, 1] => logits (B, classes, 64, 64)."""

    learned = Learned(0, 0, 0)  # not trained yet

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.classes = classes
        self.level_1 = nn.Sequential(*_block(3, width // 2))  # 64 x 64
        self.level_2 = nn.Sequential(*_block(width // 2, width, stride=2))  # 32 x 32
        self.level_4 = nn.Sequential(*_block(width, 2 * width, stride=2), *_block(2 * width, 2 * width))  # 16 x 16
        self.level_8 = nn.Sequential(*_block(2 * width, 3 * width, stride=2), *_block(3 * width, 3 * width))  # 8 x 8
        self.up_4 = nn.Sequential(*_block(5 * width, 2 * width))
        self.up_2 = nn.Sequential(*_block(3 * width, width))
        self.up_1 = nn.Sequential(*_block(width + width // 2, width))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """U-Net: each encoder level is concatenated to its decoder level."""
        full = self.level_1(pixels)
        half = self.level_2(full)
        quarter = self.level_4(half)
        x = self.up_4(torch.cat([_twice(self.level_8(quarter)), quarter], dim=1))
        x = self.up_2(torch.cat([_twice(x), half], dim=1))
        return self.head(self.up_1(torch.cat([_twice(x), full], dim=1)))

    @torch.inference_mode()
    def predict(self, images: Tensor, batch_size: int = 128) -> Tensor:
        """uint8 (N, 3, H, W) => class of each pixel, uint8 (N, 64, 64)."""
        self.eval()
        parts = [self(resized(part)).argmax(dim=1).to(torch.uint8) for part in images.split(batch_size)]
        return torch.cat(parts)


def _block(inside: int, outside: int, stride: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(outside), nn.ReLU()]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def resized(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) => float (N, 3, 64, 64) in [-1, 1]."""
    pixels = to_float(images)
    if pixels.shape[2:] == (SIDE, SIDE):
        return pixels
    return F.interpolate(pixels, (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def resized_labels(labels: Tensor) -> Tensor:
    """Whole numbers (N, H, W) => int64 (N, 64, 64), the pixel at the centre of each."""
    rows, columns = (
        ((torch.arange(SIDE) + 0.5) * size / SIDE).to(torch.int64) for size in (labels.shape[1], labels.shape[2])
    )
    return labels[:, rows[:, None], columns].to(torch.int64)


def train_segmenter(
    images: Tensor,  # uint8 (N, 3, 64, 64), real
    labels: Tensor,  # uint8 or int64 (N, 64, 64)
    classes: int,
    *,
    steps: int = 400,
    batch_size: int = 24,
    seed: int = 0,
    show: Show = lambda updates: updates,
) -> Segmenter:
    """Pixels of rare classes count more (by the root of their share); mirrored and recoloured a little."""
    with own_random_numbers(seed):
        model = Segmenter(classes).to(memory_format=torch.channels_last).train()
        share = torch.bincount(labels.flatten().to(torch.int64), minlength=classes) / labels.numel()
        weights = share.clamp_min(1e-4).rsqrt()
        weights = weights / (weights * share).sum()

        def loss() -> Tensor:
            chosen = torch.randint(len(images), (batch_size,))
            pixels, maps = _varied(resized(images[chosen]), labels[chosen].to(torch.int64))
            return F.cross_entropy(model(pixels.contiguous(memory_format=torch.channels_last)), maps, weights)

        learned = Learned(len(images), steps, batch_size)
        descend(model, loss, learned, learning_rate=4e-3, weight_decay=0.02, show=show)
    return model


def _varied(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Half mirrored; contrast and colour changed a little."""
    mirror = torch.rand(len(pixels)) < 0.5
    pixels = torch.where(mirror[:, None, None, None], pixels.flip(3), pixels)
    labels = torch.where(mirror[:, None, None], labels.flip(2), labels)
    gain = 1 + 0.3 * (torch.rand(len(pixels), 3, 1, 1) - 0.5)
    return pixels * gain + 0.2 * (torch.rand(len(pixels), 3, 1, 1) - 0.5), labels


@dataclass(frozen=True)
class SegmentationAccuracy:
    """Foreground mIoU of the predicted maps of samples with the maps they were generated for."""

    steps: int = 400  # updates of the segmenter
    batch_size: int = 24
    images: int = 4000  # largest number of training images
    needs: ClassVar[frozenset[str]] = frozenset({"segmentation"})

    def __call__(self, evidence: Evidence) -> Accuracy:
        """Train on the training split, then predict the maps of validation images and of samples."""
        images, labels = collected(evidence.real("train", ()), self.images)
        count = int(labels.max()) + 1
        options = {"steps": self.steps, "batch_size": self.batch_size, "seed": evidence.seed}
        segmenter = train_segmenter(images, labels, count, show=evidence.shown("training the segmenter"), **options)
        known, known_labels = collected(evidence.real(evidence.reference, ()))
        found = segmenter.predict(evidence.samples)
        given = [
            torch.cat([resized_labels(torch.as_tensor(one["segmentation"]).long()[None]) for one in conditions])
            for conditions in (evidence.conditions, others(evidence.conditions, evidence.seed))
        ]
        return Accuracy.of(
            [
                overlaps(segmenter.predict(known), known_labels, count),
                *(overlaps(found, maps, count) for maps in given),
            ],
            [_name(number, count, evidence.class_names) for number in range(1, count)],
            measures="foreground mIoU with the label map of the condition",
            how=(
                f"A segmenter of {count - 1} classes and background, trained on real images alone, "
                "predicts the map of every sample; intersection over union, mean over classes without background."
            ),
            learned=segmenter.learned,
        )


def _name(label: int, labels: int, names: Sequence[str]) -> str:
    """Of a label; labels are class numbers moved up by the background where the data have names for just those."""
    return class_name(str(label - 1), names) if len(names) == labels - 1 else f"label {label}"


def overlaps(found: Tensor, given: Tensor, classes: int) -> ByClass:
    """Intersection over union of predicted and input maps (N, h, w) and input pixels, by class but the background."""
    if int(given.max()) >= classes:
        raise InputError(
            f"label {int(given.max())} is in an input map but in no training image, so it cannot be measured; "
            "pack the data with another split."
        )
    if not given.any():
        raise InputError("no label map holds anything but background, so there is nothing to measure.")
    given, found = given.flatten().to(torch.int64), found.flatten().to(torch.int64)
    both, given, found = (
        torch.bincount(labels, minlength=classes)[1:] for labels in (given[given == found], given, found)
    )
    return ByClass.of(both, given + found - both, given)


def collected(batches: Batches, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, 64, 64) and label maps uint8 (N, 64, 64)."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        if len(batch["key"]):
            images.append(to_bytes(resized(batch["image"])))
            labels.append(resized_labels(batch["segmentation"]))
        if most is not None and sum(map(len, images)) >= most:
            break
    if not images:
        raise InputError("no image with a label map could be read to learn from.")
    maps = torch.cat(labels)[:most]
    if int(maps.max()) >= _LARGEST:
        raise InputError(f"label {int(maps.max())} is above 255, the largest that is supported; renumber the maps.")
    return torch.cat(images)[:most], maps.to(torch.uint8)
