"""Precision and recall, density and coverage: k-NN balls around the points of a set, with distances in tiles.

A ball around a point reaches to its k-th nearest other point of the same set.

Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019). Precision: fraction of generated points inside a ball
of the real set. Recall: fraction of real points inside a ball of the generated set.

Density and coverage (Naeem et al., ICML 2020), with balls around the real points. Density: mean number of balls that
contain a generated point, divided by k; it may exceed 1 and, unlike precision, is not raised by one outlier's large
ball. Coverage: fraction of real points whose ball contains a generated point.
"""

from typing import ClassVar

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets
from ldmlab.metrics.knn_balls import shares_inside, squared_radii

_TILE = 1024  # rows and columns of one block of distances: 4 MiB in float32


class PrecisionRecall(FeatureSets):
    """Precision and recall of generated features; the memory beyond the features is one tile.

    `screening`: 8-bit products exclude most pairs before float32 decides, with the same results; it
    needs a quarter of the features' memory more. The spread is the standard error of a proportion.
    `neighbours`: None for 3, or for one fewer than the smaller set holds.
    """

    higher_is_better = True
    title: ClassVar = {"precision": "Precision", "recall": "Recall"}
    meaning: ClassVar = {
        "precision": "fraction of generated images inside a k-NN ball of the real ones: fidelity",
        "recall": "fraction of real images inside a k-NN ball of the generated ones: variety",
    }

    def __init__(self, neighbours: int | None = None, screening: bool = False) -> None:
        super().__init__()
        self.neighbours, self.screening = neighbours, screening
        self.resolved: dict[str, int] = {}  # options as they were used, after `compute`

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float64 in [0, 1], each with `_std`."""
        real, fake = self.centred_sets()
        neighbours = fitting(self.neighbours, 3, min(len(real), len(fake)))
        self.resolved = {"neighbours": neighbours}
        precision, recall = precision_recall(real, fake, neighbours, self.screening)
        return {
            "precision": precision,
            "precision_std": share_error(precision, len(fake)),
            "recall": recall,
            "recall_std": share_error(recall, len(real)),
        }

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images."""
        if count <= (self.neighbours or 1):
            raise InputError(
                f"metric.precision_recall.neighbours={self.neighbours} needs more than {count} {name} images."
            )


class DensityCoverage(FeatureSets):
    """Density and coverage of generated features; the memory beyond the features is one tile.

    `neighbours`: None for 5, or for one fewer than there are real images.
    """

    higher_is_better = True
    title: ClassVar = {"density": "Density", "coverage": "Coverage"}
    meaning: ClassVar = {
        "density": "real k-NN balls that contain a generated image, over k; 1 for two halves of one set",
        "coverage": "fraction of real k-NN balls containing a generated image",
    }

    def __init__(self, neighbours: int | None = None) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.resolved: dict[str, int] = {}  # options as they were used, after `compute`

    def compute(self) -> dict[str, Tensor]:
        """`density`, 0 and up, and `coverage` in [0, 1], float64, each with its standard error `_std`."""
        real, fake = self.centred_sets()
        neighbours = fitting(self.neighbours, 5, len(real))
        self.resolved = {"neighbours": neighbours}
        balls, covered = squared_radii(real, neighbours), []
        lying_in = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real balls, of each generated point
        for rows, radii in zip(real.split(_TILE), balls.split(_TILE), strict=True):
            held = torch.zeros(len(rows), dtype=torch.int64, device=real.device)  # generated points in each ball
            for columns, found in zip(fake.split(_TILE), lying_in.split(_TILE), strict=True):
                inside = squared_distances(rows, columns) < radii[:, None]
                held += inside.sum(dim=1)
                found += inside.sum(dim=0)
            covered.append(held > 0)
        density, coverage = lying_in.double() / neighbours, torch.cat(covered).double().mean()
        return {
            "density": density.mean(),
            "density_std": density.std(correction=0) / len(fake) ** 0.5,
            "coverage": coverage,
            "coverage_std": share_error(coverage, len(real)),
        }

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images; generated ones may be any number."""
        if name == "real" and count <= (self.neighbours or 1):
            raise InputError(
                f"metric.density_coverage.neighbours={self.neighbours} needs more than {count} real images."
            )


def fitting(neighbours: int | None, usual: int, count: int) -> int:
    """The k of balls among `count` points: as set, else the usual one or the largest that they allow."""
    return min(usual, count - 1) if neighbours is None else neighbours


def precision_recall(real: Tensor, fake: Tensor, neighbours: int, screening: bool = False) -> tuple[Tensor, Tensor]:
    """Precision and recall, float64 scalars, of centred features (N, D)."""
    balls = [squared_radii(part, neighbours, screening) for part in (fake, real)]
    return shares_inside(fake, balls[0], real, balls[1], screening)


def share_error(share: Tensor, count: int) -> Tensor:
    """Standard error sqrt(p (1 - p) / n) of a share of independent images, the balls taken as they are."""
    return (share * (1 - share) / count).sqrt()


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, (n, m), not below 0."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :]
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


def nearest(points: Tensor, others: Tensor, tile: int = _TILE) -> tuple[Tensor, Tensor]:
    """Squared distance (n,) and index (n,) of the nearest of `others` to each point."""
    found = []
    for rows in points.split(tile):
        parts = [squared_distances(rows, some).min(dim=1) for some in others.split(tile)]
        distance, part = torch.stack([one.values for one in parts]).min(dim=0)
        index = torch.stack([one.indices for one in parts]).gather(0, part[None])[0]
        found.append((distance, index + part * tile))
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)
