"""Kernel distance between features (Binkowski et al., ICLR 2018); "KID" with Inception features.

Unbiased MMD^2 with k(x, y) = (x . y / D + 1)^3 over random subsets; mean and population standard deviation. The subsets
come from a seeded generator (torch-fidelity's), where torchmetrics draws from the global one.
"""

import numpy as np
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets

_BLOCK = 256  # rows of the kernel of a set with itself that are computed at a time


class KernelDistance(FeatureSets):
    """Kernel distance of generated to real features; unbiased, so it suits small sets too and may be below 0."""

    idle_without = "at_most: subset_size=null"
    higher_is_better = False
    title = "Kernel distance"
    meaning = "unbiased distance of the features; about 0 for two halves of one set"

    def __init__(
        self,
        subsets: int = 100,
        subset_size: int | None = None,  # images in each; None: `at_most`, or the smaller set where it holds fewer
        seed: int = 2020,
        at_most: int = 1000,
    ) -> None:
        super().__init__()
        for name, value, least in (("subsets", subsets, 1), ("subset_size", subset_size, 2), ("at_most", at_most, 2)):
            if value is not None and value < least:
                raise InputError(f"metric.kid.{name}={value} is too few; choose at least {least}.")
        self.subsets, self.subset_size, self.seed, self.at_most = subsets, subset_size, seed, at_most
        self.resolved: dict[str, int] = {}  # options as they were used, after `compute`
        self.remarks: dict[str, str] = {}  # by score, after `compute`

    def compute(self) -> dict[str, Tensor]:
        """`kid`, and `kid_std` where subsets differ."""
        real, fake = self.sets()
        fewest = min(len(real), len(fake))
        size = min(self.at_most, fewest) if self.subset_size is None else self.subset_size
        few = self.subset_size is None and size < self.at_most
        self.resolved = {"subset_size": size}
        self.remarks = {"kid": f"subsets of {size} images, all that the smaller set holds"} if few else {}
        generator = np.random.RandomState(self.seed)  # torch-fidelity's generator
        values = []
        for _ in range(self.subsets):
            some_fake = fake[torch.from_numpy(generator.choice(len(fake), size, replace=False))]
            some_real = real[torch.from_numpy(generator.choice(len(real), size, replace=False))]
            values.append(squared_mmd(some_fake, some_real))
        scores = torch.stack(values)
        whole = size == len(real) == len(fake)  # every subset is the same: no spread
        return {"kid": scores.mean()} | ({} if whole else {"kid_std": scores.std(correction=0)})

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images, real or generated."""
        if count < 2:
            raise InputError(f"metric.kid needs at least 2 {name} images, there are {count}; leave that score out.")
        if self.subset_size is not None and count < self.subset_size:
            raise InputError(
                f"metric.kid.subset_size={self.subset_size} is more than the {count} {name} images at hand; "
                f"choose at most {count}."
            )


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD^2 of two sets (m, D) and (n, D) with the cubic kernel; products in float32, sums in float64."""
    return _mean_of_others(x) + _mean_of_others(y) - 2 * _kernel(x, y).mean(dtype=torch.float64)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x . y / D + 1)^3, (m, n)."""
    return torch.addmm(x.new_ones(1), x, y.T, alpha=1 / x.shape[1]).pow_(3)


def _mean_of_others(x: Tensor) -> Tensor:
    """Mean of the kernel over pairs of different points, each computed once but for those near the diagonal."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _BLOCK):
        kernel = _kernel(x[start : start + _BLOCK], x[start:])
        own = kernel[:, : len(kernel)]
        total += 2 * kernel.sum(dtype=torch.float64) - own.sum(dtype=torch.float64)
        total -= own.diagonal().sum(dtype=torch.float64)
    return total / (len(x) * (len(x) - 1))
