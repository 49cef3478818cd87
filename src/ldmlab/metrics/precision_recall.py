"""Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019), with distances in tiles.

Each set is described by balls around its points that reach to the k-th other point. Precision: share of generated
points inside a ball of the real set. Recall: share of real points inside a ball of the generated set.
"""

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets
from ldmlab.metrics.balls import ball_sizes, shares_inside

_TILE = 1024  # rows and columns of one block of distances: 4 MiB in float32


class PrecisionRecall(FeatureSets):
    """Precision and recall of generated features; the memory beyond the features is one tile.

    `screening`: 8-bit products rule most pairs out before float32 decides (`screening.py`), with the same answers; it
    takes a quarter of the features' memory more. The spread is the standard error of a share of so many images.
    """

    higher_is_better = True

    def __init__(self, neighbours: int = 3, screening: bool = False) -> None:
        super().__init__()
        self.neighbours, self.screening = neighbours, screening

    def compute(self) -> dict[str, Tensor]:
        """`precision` and `recall`, float64 in [0, 1], each with `_std`."""
        real, fake = self.sets()
        for name, features in (("real", real), ("generated", fake)):
            self.check_count(len(features), name)
        centre = real.mean(dim=0)  # distances are differences of squares: small numbers keep float32 exact enough
        real, fake = real.sub_(centre).to(self.device), fake.sub_(centre).to(self.device)  # both are our own copies
        balls = [ball_sizes(part, self.neighbours, self.screening) for part in (fake, real)]
        precision, recall = shares_inside(fake, balls[0], real, balls[1], self.screening)
        return {
            "precision": precision,
            "precision_std": share_error(precision, len(fake)),
            "recall": recall,
            "recall_std": share_error(recall, len(real)),
        }

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images."""
        if count <= self.neighbours:
            raise InputError(
                f"metric.precision_recall.neighbours={self.neighbours} needs more than {count} {name} images."
            )


def share_error(share: Tensor, count: int) -> Tensor:
    """Standard error sqrt(p (1 - p) / n) of a share of independent images, the balls taken as they are."""
    return (share * (1 - share) / count).sqrt()


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
