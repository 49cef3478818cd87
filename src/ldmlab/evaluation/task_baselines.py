"""Baselines without a model, as a lower bound for trained models of the task.

Their inputs are the model's: known pixels and the hole, or the low-resolution image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.evaluators import Baseline, Batches, Fields


@dataclass(frozen=True)
class Bicubic(Baseline):
    """The low-resolution image enlarged by Pillow's bicubic kernel."""

    factor: int = 4
    needs: ClassVar[frozenset[str]] = frozenset({"low_resolution"})
    title: ClassVar[str] = "bicubic"

    def __call__(self, conditions: Sequence[Fields]) -> Tensor:
        """uint8 (B, 3, H, W)."""
        found = []
        for small in (np.asarray(one["low_resolution"]) for one in conditions):
            size = (small.shape[1] * self.factor, small.shape[0] * self.factor)
            found.append(np.array(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)))
        return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class MeanFill(Baseline):
    """The hole filled with the mean colour of the known pixels."""

    needs: ClassVar[frozenset[str]] = frozenset({"image", "mask"})
    title: ClassVar[str] = "mean fill"

    def __call__(self, conditions: Sequence[Fields]) -> Tensor:
        """uint8 (B, 3, H, W)."""
        images, holes = given(conditions)
        known = (~holes).float()
        mean = (images.float() * known).sum((2, 3)) / known.sum((2, 3)).clamp_min(1)
        return torch.where(holes, mean.round().to(torch.uint8)[:, :, None, None], images)


@dataclass
class NearestPatch(Baseline):
    """The hole copied from the training image whose pixels around it are nearest, at the same place."""

    border: int = 8  # px around the hole that are compared
    images: int = 3000  # training images searched
    needs: ClassVar[frozenset[str]] = frozenset({"image", "mask"})
    title: ClassVar[str] = "nearest training patch"
    _train: Tensor | None = field(default=None, repr=False)  # uint8 (N, 3, H, W)

    def learn(self, real: Batches) -> None:
        """Keep the first images."""
        kept: list[Tensor] = []
        for batch in real:
            if len(batch["key"]):
                kept.append(batch["image"])
            if sum(map(len, kept)) >= self.images:
                break
        if not kept:
            raise InputError("no training image could be read to copy patches from.")
        self._train = torch.cat(kept)[: self.images]

    def __call__(self, conditions: Sequence[Fields]) -> Tensor:
        """uint8 (B, 3, H, W)."""
        assert self._train is not None
        images, holes = given(conditions)
        kernel = np.ones((2 * self.border + 1,) * 2, np.uint8)
        wide = [cv2.dilate(hole[0].numpy().astype(np.uint8), kernel) for hole in holes]
        around = torch.from_numpy(np.stack(wide))[:, None].bool() & ~holes  # known pixels that are compared
        # sum over compared pixels of (x - t)^2 = w x^2 - 2 (w x) t + w t^2, in two products
        weight = around.float().expand_as(images).flatten(1)  # (B, D)
        weighted = (images.float() / 255).flatten(1) * weight
        distances = []
        for part in self._train.split(256):
            train = (part.float() / 255).flatten(1)  # (n, D)
            distances.append(weight @ train.square().T - 2 * weighted @ train.T)
        found = torch.cat(distances, dim=1).argmin(dim=1)  # training numbers (B,)
        return torch.where(holes, self._train[found], images)


def given(conditions: Sequence[Fields]) -> tuple[Tensor, Tensor]:
    """Images uint8 (B, 3, H, W), black in the hole, and the holes, bool (B, 1, H, W)."""
    images = torch.stack([torch.from_numpy(np.array(one["image"])).permute(2, 0, 1) for one in conditions])
    holes = torch.stack([torch.from_numpy(np.asarray(one["mask"]) > 0)[None] for one in conditions])
    return torch.where(holes, torch.zeros_like(images), images), holes
