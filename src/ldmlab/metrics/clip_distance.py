"""CMMD (Jayasumana et al., CVPR 2024): the kernel distance of CLIP embeddings of unit length, times 1000.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(x, y) = exp(-|x - y|^2 / (2 sigma^2)), sigma = 10

The means include a point with itself, as in the authors' program. All kernel values are near 1, so they are summed as
k - 1 in float64, where the ones cancel exactly. The published scale belongs to ViT-L-14-336 of openai.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets
from ldmlab.metrics.precision_recall import squared_distances

_TILE = 1024  # rows and columns of one block of distances
_FACTOR = 1000.0  # of the published values


class ClipDistance(FeatureSets):
    """CMMD of generated to real images; the memory beyond the features is one tile."""

    higher_is_better = False

    def __init__(self, sigma: float = 10.0) -> None:
        super().__init__()
        if sigma <= 0:
            raise InputError(f"metric.cmmd.sigma={sigma} is no width of a kernel; choose a number above 0.")
        self.sigma = sigma

    def update(self, clip: Tensor, real: bool, index: Tensor | None = None) -> None:
        """CLIP embeddings (B, D) of any length."""
        super().update(clip, real, index)

    def compute(self) -> dict[str, Tensor]:
        """`cmmd`, float64, 0 for equal sets."""
        real, fake = (F.normalize(part, dim=1).to(self.device) for part in self.sets())
        centre = real.mean(dim=0)
        real, fake = real - centre, fake - centre
        gamma = 1 / (2 * self.sigma**2)
        xx, yy, xy = (_mean_kernel_below_1(a, b, gamma) for a, b in ((real, real), (fake, fake), (real, fake)))
        return {"cmmd": _FACTOR * (xx + yy - 2 * xy)}


def _mean_kernel_below_1(a: Tensor, b: Tensor, gamma: float) -> Tensor:
    """Mean of k(a_i, b_j) - 1 over all pairs, float64 scalar."""
    total = torch.zeros((), dtype=torch.float64, device=a.device)
    for rows in a.split(_TILE):
        for columns in b.split(_TILE):
            total += torch.expm1(squared_distances(rows, columns).mul_(-gamma)).sum(dtype=torch.float64)
    return total / (len(a) * len(b))
