"""Kernel distance between features (Binkowski et al., ICLR 2018); "KID" with Inception features.

Unbiased MMD^2 with k(x, y) = (x . y / D + 1)^3 over random subsets; mean and population standard deviation. The subsets
come from a seeded generator (torch-fidelity's), where torchmetrics draws from the global one.
"""

import numpy as np
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets


class KernelDistance(FeatureSets):
    """Kernel distance of generated to real features; unbiased, so it serves small sets too and may be below 0."""

    higher_is_better = False

    def __init__(self, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> None:
        super().__init__()
        self.subsets, self.subset_size, self.seed = subsets, subset_size, seed

    def compute(self) -> dict[str, Tensor]:
        """`kid` and `kid_std`."""
        real, fake = self.sets()
        fewest = min(len(real), len(fake))
        if fewest < self.subset_size:
            raise InputError(
                f"metric.kid.subset_size={self.subset_size} is more than the {fewest} pictures at hand; "
                f"choose at most {fewest}."
            )
        generator = np.random.RandomState(self.seed)  # torch-fidelity's generator
        values = []
        for _ in range(self.subsets):
            some_fake = fake[torch.from_numpy(generator.choice(len(fake), self.subset_size, replace=False))]
            some_real = real[torch.from_numpy(generator.choice(len(real), self.subset_size, replace=False))]
            values.append(squared_mmd(some_fake, some_real))
        scores = torch.stack(values)
        return {"kid": scores.mean(), "kid_std": scores.std(correction=0)}


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD^2 of two sets (m, D) and (n, D) with the cubic kernel; products in float32, sums in float64."""
    kernel_xx, kernel_yy, kernel_xy = ((a @ b.T).div_(x.shape[1]).add_(1).pow_(3) for a, b in ((x, x), (y, y), (x, y)))
    return _mean_of_others(kernel_xx) + _mean_of_others(kernel_yy) - 2 * kernel_xy.mean(dtype=torch.float64)


def _mean_of_others(kernel: Tensor) -> Tensor:
    """Mean over pairs of different points."""
    count = len(kernel)
    return (kernel.sum(dtype=torch.float64) - kernel.diagonal().sum(dtype=torch.float64)) / (count * (count - 1))
