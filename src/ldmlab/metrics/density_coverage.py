"""Density and coverage (Naeem et al., ICML 2020), with distances in tiles.

With balls around the real points that reach to the k-th other real point:
density is the mean number of balls a generated point lies in, divided by k; it may exceed 1 and, unlike precision, is
not fooled by one outlier's large ball. Coverage is the share of real points whose ball holds a generated point.
"""

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.accumulate import FeatureSets
from ldmlab.metrics.balls import ball_sizes
from ldmlab.metrics.precision_recall import share_error, squared_distances

_TILE = 1024  # rows and columns of one block of distances: 4 MiB in float32


class DensityCoverage(FeatureSets):
    """Density and coverage of generated features; the memory beyond the features is one tile."""

    higher_is_better = True

    def __init__(self, neighbours: int = 5) -> None:
        super().__init__()
        self.neighbours = neighbours

    def compute(self) -> dict[str, Tensor]:
        """`density`, 0 and up, and `coverage` in [0, 1], float64, each with its standard error `_std`."""
        real, fake = self.sets()
        self.check_count(len(real), "real")
        centre = real.mean(dim=0)  # distances are differences of squares: small numbers keep float32 exact enough
        real, fake = real.sub_(centre).to(self.device), fake.sub_(centre).to(self.device)  # both are our own copies
        balls, covered = ball_sizes(real, self.neighbours), []
        lying_in = torch.zeros(len(fake), dtype=torch.int64, device=fake.device)  # real balls, of each generated point
        for top in range(0, len(real), _TILE):
            rows = slice(top, top + _TILE)
            held = torch.zeros(len(real[rows]), dtype=torch.int64, device=real.device)  # generated points in each ball
            for left in range(0, len(fake), _TILE):
                columns = slice(left, left + _TILE)
                inside = squared_distances(real[rows], fake[columns]) < balls[rows, None]
                held += inside.sum(dim=1)
                lying_in[columns] += inside.sum(dim=0)
            covered.append(held > 0)
        density, coverage = lying_in.double() / self.neighbours, torch.cat(covered).double().mean()
        return {
            "density": density.mean(),
            "density_std": density.std(correction=0) / len(fake) ** 0.5,
            "coverage": coverage,
            "coverage_std": share_error(coverage, len(real)),
        }

    def check_count(self, count: int, name: str) -> None:
        """Refuses too few `name` images; generated ones may be any number."""
        if name == "real" and count <= self.neighbours:
            raise InputError(
                f"metric.density_coverage.neighbours={self.neighbours} needs more than {count} real images."
            )
