"""Frechet distance between Gaussians fitted to features (Heusel et al., NeurIPS 2017); "FID" with Inception features.

    |mu_r - mu_f|^2 + tr(S_r) + tr(S_f) - 2 tr((S_r S_f)^(1/2)),   S with n - 1

The trace of the root is taken from symmetric eigenvalues in float64: with S_r = R R, the eigenvalues of S_r S_f are
those of the symmetric R S_f R. Nothing but sums is kept, so memory does not grow with the number of pictures.
"""

import torch
from torch import Tensor
from torchmetrics import Metric

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import check_features

SMALL_SAMPLE = 2048  # below this many pictures the estimate is biased and marked as such


class FrechetDistance(Metric):
    """Frechet distance of generated to real features, streaming and exact over processes.

    `small_sample`: also below as many pictures as features are wide, where the covariance is singular by construction.
    """

    full_state_update = False
    higher_is_better = False
    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor
    fake_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor

    def __init__(self, width: int, small_sample: bool = False) -> None:
        super().__init__(compute_with_cache=False)
        self.width, self.small_sample = width, small_sample
        for side in ("real", "fake"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(width, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(width, width, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Features (B, D)."""
        side = "real" if real else "fake"
        features = check_features(features, f"{side} features").to(self.real_sum.device).double()
        if features.shape[1] != self.width:
            raise InputError(f"features are {features.shape[1]} wide where this metric was built for {self.width}.")
        getattr(self, f"{side}_count").add_(len(features))
        getattr(self, f"{side}_sum").add_(features.sum(dim=0))
        getattr(self, f"{side}_outer").addmm_(features.T, features)

    def compute(self) -> dict[str, Tensor]:
        """`fid`; exact within float64, and never below 0 but for rounding."""
        for side, name in (("real", "real"), ("fake", "generated")):
            self._check_count(int(getattr(self, f"{side}_count")), name)
        real = gaussian(self.real_count, self.real_sum, self.real_outer)
        fake = gaussian(self.fake_count, self.fake_sum, self.fake_outer)
        return {"fid": frechet_distance(*real, *fake)}

    def _check_count(self, count: int, name: str) -> None:
        if count < 2:
            raise InputError(f"{count} {name} pictures were given; the Frechet distance needs at least 2.")
        if count < self.width and not self.small_sample:
            raise InputError(
                f"{count} {name} pictures are fewer than the {self.width} features, so the covariance is singular and "
                f"the distance means little; give at least {self.width}, choose kid, or set "
                "metric.fid.small_sample=true."
            )


def gaussian(count: Tensor, total: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) with n - 1, from the sums of x and of x x^T."""
    mean = total / count
    return mean, (outer - count * torch.outer(mean, mean)) / (count - 1)


def frechet_distance(mean_1: Tensor, cov_1: Tensor, mean_2: Tensor, cov_2: Tensor) -> Tensor:
    """The distance squared of two Gaussians, float64 scalar."""
    values, vectors = torch.linalg.eigh(cov_1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    product = root @ cov_2 @ root
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0).sqrt().sum()
    return (mean_1 - mean_2).square().sum() + cov_1.trace() + cov_2.trace() - 2 * trace_root
