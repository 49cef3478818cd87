"""The Frechet distance without the bias of few samples: FID_inf (Chong and Forsyth, CVPR 2020), from one pass.

    d(n) = d_inf + b / n + O(1 / n^2),   n generated images against a fixed reference

The generated images fall into groups, and at each size N / parts, parts = 1 .. 4, the mean over disjoint parts that
together hold every image gives a point. A straight line over 1 / n, weighted with n^2 since the neglected term grows
with 1 / n^2, meets the axis at d_inf. The bias of the reference's own number of images stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.frechet import Distance, FrechetDistance, Sums, gaussian

PARTS = (1, 2, 3, 4)
_GROUPS = 12  # every number of parts divides it
ENOUGH_A_FEATURE = 8  # images; below that, fits of known Gaussians were seen to miss by more than their error


class FrechetLimit(FrechetDistance):
    """`fid_inf` with its standard error by the delete-a-group jackknife; `points` is the curve, after `compute`."""

    score_name = "fid_inf"
    title = "Fréchet distance, infinitely many samples"
    meaning = "extrapolated by a line over 1 / samples"

    def __init__(self, width: int, small_sample: bool = False, spread: bool = True) -> None:
        super().__init__(width, small_sample, spread_groups=_GROUPS)
        self.spread = spread
        self.points: list[dict[str, float]] = []  # images, value; the largest number first

    def _found(self, distance: Distance, whole: Sums) -> dict[str, Tensor]:
        fewest = int(self.fake_count.min())
        if fewest < 2:
            raise InputError(
                f"metric.fid_inf cuts the generated images into {_GROUPS} groups, and {int(whole[0])} are too few; "
                f"give at least {2 * _GROUPS}, or leave that score out."
            )
        rows = {parts: [self._row(distance, range(part, _GROUPS, parts)) for part in range(parts)] for parts in PARTS}
        self.points = [{"images": float(whole[0]) / parts, "value": _mean(rows[parts], 1)} for parts in PARTS]
        found = {self.score_name: torch.tensor(_intercept(rows), dtype=torch.float64)}
        if self.spread:
            values = torch.tensor([self._without(group, distance, rows) for group in range(_GROUPS)])
            found[f"{self.score_name}_std"] = ((_GROUPS - 1) * values.double().var(correction=0)).sqrt()
        return found

    def _row(self, distance: Distance, groups: Sequence[int]) -> tuple[float, float]:
        """1 / n and the distance of the images of some groups."""
        sums = self._sums("fake", groups)
        return 1 / float(sums[0]), float(distance(*gaussian(*sums)))

    def _without(self, group: int, distance: Distance, rows: dict[int, list[tuple[float, float]]]) -> float:
        """d_inf from all groups but one: of each size one part changes."""
        changed = {parts: list(rows[parts]) for parts in PARTS}
        for parts in PARTS:
            part = group % parts
            others = [other for other in range(part, _GROUPS, parts) if other != group]
            changed[parts][part] = self._row(distance, others)
        return _intercept(changed)


def _mean(rows: list[tuple[float, float]], column: int) -> float:
    return sum(row[column] for row in rows) / len(rows)


def _intercept(rows: dict[int, list[tuple[float, float]]]) -> float:
    """Where the weighted line through the sizes' means of (1 / n, distance) meets the axis."""
    x, y = (torch.tensor([_mean(rows[parts], column) for parts in PARTS], dtype=torch.float64) for column in (0, 1))
    weight = x.pow(-2)
    centre_x, centre_y = (weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()
    slope = (weight * (x - centre_x) * (y - centre_y)).sum() / (weight * (x - centre_x).square()).sum()
    return float(centre_y - slope * centre_x)
