"""Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019), with distances in tiles.

Each set is described by balls around its points that reach to the k-th other point. Precision: share of generated
points inside a ball of the real set. Recall: share of real points inside a ball of the generated set.
"""

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets

_TILE = 1024  # rows and columns of one block of distances: 4 MiB in float32


class PrecisionRecall(FeatureSets):
    """Precision and recall of generated features; the memory beyond the features is one tile."""

    higher_is_better = True

    def __init__(self, neighbours: int = 3) -> None:
        super().__init__()
        self.neighbours = neighbours

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float64 in [0, 1]."""
        real, fake = self.sets()
        if min(len(real), len(fake)) <= self.neighbours:
            raise InputError(
                f"metric.precision_recall.neighbours={self.neighbours} needs more pictures than "
                f"{len(real)} real and {len(fake)} generated ones."
            )
        centre = real.mean(dim=0)  # distances are differences of squares: small numbers keep float32 exact enough
        real, fake = real.sub_(centre).to(self.device), fake.sub_(centre).to(self.device)  # both are our own copies
        precision, recall = shares_inside(
            fake, ball_sizes(fake, self.neighbours), real, ball_sizes(real, self.neighbours)
        )
        return {"precision": precision, "recall": recall}


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """|a_i - b_j|^2, (n, m), not below 0."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)[None, :]
    return torch.addmm(squares, a, b.T, alpha=-2).clamp_min_(0)


def nearest(
    points: Tensor, others: Tensor, count: int, *, skip_self: bool = False, tile: int = _TILE
) -> tuple[Tensor, Tensor]:
    """Squared distances (n, count), ascending, and indices of the `count` nearest `others` of each point.

    `skip_self`: both are one set, and the point itself does not count.
    """
    found_distances, found_indices = [], []
    for start in range(0, len(points), tile):
        rows = points[start : start + tile]
        best = rows.new_full((len(rows), 0), 0.0)
        best_index = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
        for left in range(0, len(others), tile):
            distances = squared_distances(rows, others[left : left + tile])
            if skip_self and left == start:
                distances.fill_diagonal_(torch.inf)
            index = torch.arange(left, left + distances.shape[1], device=rows.device).expand(len(rows), -1)
            close, chosen = distances.topk(min(count, distances.shape[1]), dim=1, largest=False)
            best, best_index = torch.cat([best, close], 1), torch.cat([best_index, index.gather(1, chosen)], 1)
            best, chosen = best.topk(min(count, best.shape[1]), dim=1, largest=False)
            best_index = best_index.gather(1, chosen)
        found_distances.append(best)
        found_indices.append(best_index)
    return torch.cat(found_distances), torch.cat(found_indices)


def ball_sizes(points: Tensor, neighbours: int) -> Tensor:
    """Squared distance (n,) of each point to its k-th nearest other point."""
    return nearest(points, points, neighbours, skip_self=True)[0][:, -1]


def shares_inside(a: Tensor, ball_a: Tensor, b: Tensor, ball_b: Tensor) -> tuple[Tensor, Tensor]:
    """Share of the points `a` in at least one ball of `b` (border included), and of `b` in one of `a`; float64."""
    a_inside = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    b_inside = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    for top in range(0, len(a), _TILE):
        for left in range(0, len(b), _TILE):
            rows, columns = slice(top, top + _TILE), slice(left, left + _TILE)
            distances = squared_distances(a[rows], b[columns])
            a_inside[rows] |= (distances <= ball_b[columns]).any(dim=1)
            b_inside[columns] |= (distances <= ball_a[rows, None]).any(dim=0)
    return a_inside.double().mean(), b_inside.double().mean()
