"""Frechet distance between Gaussians fitted to features (Heusel et al., NeurIPS 2017); "FID" with Inception features.

    |mu_r - mu_f|^2 + tr(S_r) + tr(S_f) - 2 tr((S_r S_f)^(1/2)),   S with n - 1

The trace of the root is taken from symmetric eigenvalues in float64: with S_r = R R, the eigenvalues of S_r S_f are
those of the symmetric R S_f R. Nothing but sums is kept, so memory does not grow with the number of images.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import check_features
from ldmlab.metrics.features import SPATIAL_WIDTH

SMALL_SAMPLE = 2048  # below this many images the estimate is biased and marked as such
_BLOCK = 512  # features whose products are added together; 2048 of them make 10 of 16 blocks
Sums = tuple[Tensor, ...]  # count (), sum (D,) and outer (D, D) of some features
Distance = Callable[[Tensor, Tensor], Tensor]  # mean (D,), covariance (D, D) => distance to a fixed Gaussian


class FrechetDistance(Metric):
    """Frechet distance of generated to real features, streaming and exact over processes.

    `small_sample`: also below as many images as features are wide, where the covariance is singular by construction.
    `spread_groups`: the standard error of the distance over draws of the generated images, by the delete-a-group
    jackknife, sqrt((G - 1) / G sum_g (d_g - mean d)^2), with image i in group i mod G; 0 for none.
    """

    score_name = "fid"
    title = "Fréchet distance"
    meaning = "distance between the Gaussians of real and generated features"
    statistics_name = "fid"  # of the given statistics that may replace real features

    full_state_update = False
    higher_is_better = False
    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor
    fake_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor

    def __init__(self, width: int, small_sample: bool = False, spread_groups: int = 0) -> None:
        super().__init__(compute_with_cache=False)
        if spread_groups < 0 or spread_groups == 1:
            raise InputError(f"metric.{self.score_name}.spread_groups={spread_groups}; choose 0 for none, or 2 and up.")
        self.width, self.small_sample, self.spread_groups = width, small_sample, spread_groups
        self._real_is_given = False
        for side, groups in (("real", 1), ("fake", max(spread_groups, 1))):
            self.add_state(f"{side}_count", torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum")
            for name, shape in (("sum", (width,)), ("outer", (width, width))):
                zeros = torch.zeros(groups, *shape, dtype=torch.float64)
                self.add_state(f"{side}_{name}", zeros, dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool, index: Tensor | None = None) -> None:
        """Features (B, D); `index` (B,) numbers the images over all processes (default: as they come)."""
        if real and self._real_is_given:
            return
        side = "real" if real else "fake"
        features = check_features(features, f"{side} features").to(self.real_sum.device).double()
        if features.shape[1] != self.width:
            raise InputError(f"features are {features.shape[1]} wide where this metric was built for {self.width}.")
        count, total, outer = (getattr(self, f"{side}_{part}") for part in ("count", "sum", "outer"))
        if index is None:
            index = torch.arange(len(features)) + int(count.sum())
        group = index.to(count.device) % len(count)
        for number in group.unique().tolist():
            rows = features if len(count) == 1 else features[group == number]
            count[number] += len(rows)
            total[number] += rows.sum(dim=0)
            add_outer(outer[number], rows)

    def take_real(self, mean: Tensor, covariance: Tensor, first: bool = True) -> None:
        """Mean (D,) and covariance (D, D) in place of real features, which are then ignored; all processes call it."""
        if mean.shape != (self.width,):
            raise InputError(f"the given statistics are {len(mean)} wide where this metric was built for {self.width}.")
        self._real_is_given = True
        if first:
            count = self.width + 1  # the number of images is unknown, and used for nothing but its check
            device, mean, covariance = self.real_sum.device, mean.double(), covariance.double()
            self.real_count[0] = count
            self.real_sum[0] = (mean * count).to(device)
            self.real_outer[0] = (covariance * (count - 1) + count * torch.outer(mean, mean)).to(device)

    def samples(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of this process's generated features."""
        self.check_count(int(self.fake_count.sum()), "generated")
        return gaussian(*self._sums("fake"))

    def _sums(self, side: str, groups: Sequence[int] | None = None) -> Sums:
        """Sums over all groups, or some of them."""
        parts = (getattr(self, f"{side}_{part}") for part in ("count", "sum", "outer"))
        return tuple((part if groups is None else part[list(groups)]).sum(dim=0) for part in parts)

    def compute(self) -> dict[str, Tensor]:
        """`fid`, exact within float64 and never below 0 but for rounding, and `fid_std` with `spread_groups`."""
        real, fake = self._sums("real"), self._sums("fake")
        self.check_count(int(real[0]), "real")
        self.check_count(int(fake[0]), "generated")
        return self._found(distance_from(*gaussian(*real)), fake)

    def _found(self, distance: Distance, whole: Sums) -> dict[str, Tensor]:
        """The scores by name, from the distance to the real features and the sums over all generated ones."""
        found = {self.score_name: distance(*gaussian(*whole))}
        if self.spread_groups:
            found[f"{self.score_name}_std"] = self._jackknife(distance, whole)
        return found

    def _jackknife(self, distance: Distance, whole: Sums) -> Tensor:
        """Standard error of the distance over the groups that hold an image, float64 scalar."""
        held = [group for group in range(self.spread_groups) if self.fake_count[group]]
        without = [[a - b for a, b in zip(whole, self._sums("fake", [group]), strict=True)] for group in held]
        if len(held) < 2 or min(int(count) for count, _, _ in without) < 2:
            raise InputError(
                f"metric.{self.score_name}.spread_groups={self.spread_groups} is too many for {int(whole[0])} "
                "images; choose 0."
            )
        distances = torch.stack([distance(*gaussian(*parts)) for parts in without])
        return ((len(held) - 1) * distances.var(correction=0)).sqrt()

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images, real or generated."""
        if count < 2:
            raise InputError(f"{count} {name} images were given; the Frechet distance needs at least 2.")
        if count < self.width and not self.small_sample:
            raise InputError(
                f"{count} {name} images are fewer than the {self.width} features, so the covariance is singular and "
                f"the distance means little; give at least {self.width}, choose kid, or set "
                f"metric.{self.score_name}.small_sample=true."
            )


class SpatialFrechetDistance(FrechetDistance):
    """sFID (Nash et al., ICML 2021) as ADM's script has it: the Frechet distance of spatial features, 2023 wide."""

    score_name = statistics_name = "sfid"
    title = "sFID"
    meaning = "Fréchet distance of spatial features: those that keep their place in the image"

    def __init__(self, small_sample: bool = False, spread_groups: int = 0) -> None:
        super().__init__(SPATIAL_WIDTH, small_sample, spread_groups)

    def update(self, spatial: Tensor, real: bool, index: Tensor | None = None) -> None:
        """Spatial features (B, 2023)."""
        super().update(spatial, real, index)


def add_outer(outer: Tensor, rows: Tensor) -> None:
    """Add x x^T of rows (B, D) to (D, D); beneath the diagonal only parts of it, for it is symmetric."""
    for first in range(0, len(outer), _BLOCK):
        some = slice(first, first + _BLOCK)
        outer[some, first:].addmm_(rows[:, some].T, rows[:, first:])


def whole(outer: Tensor) -> Tensor:
    """Symmetric matrices (..., D, D) from what is on and above their diagonals."""
    return outer.triu() + outer.triu(1).mT


def gaussian(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) with n - 1, from the sums of x and of x x^T as `add_outer` leaves them."""
    mean = total / count
    return mean, (whole(outer) - count * torch.outer(mean, mean)) / (count - 1)


def distance_from(mean_1: Tensor, cov_1: Tensor) -> Distance:
    """The distance squared of any Gaussian to this one, whose root is taken once."""
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    def distance(mean_2: Tensor, cov_2: Tensor) -> Tensor:
        product = root @ cov_2 @ root
        trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
        return (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root

    return distance
