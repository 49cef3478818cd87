"""The training image nearest to each of some points in feature space, from one pass that keeps no training features.

Distances are cosine distances, 0 .. 2. A sample is called a copy when it is nearer to a training image than all but
the nearest hundredth of held-out real images are: near-twins that exist in the data by nature (variants of one emoji)
set the threshold, not a fixed number.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.evaluation.record import gathered
from ldmlab.metrics.precision_recall import nearest


class Nearest:
    """Of each point (N, D) the nearest training image so far."""

    def __init__(self, points: Tensor) -> None:
        self.points = F.normalize(points.float(), dim=1)
        self.distance = torch.full((len(points),), torch.inf)
        self.number = torch.full((len(points),), -1)
        self.seen = 0  # training images of this process

    def add(self, train: Tensor, numbers: Tensor) -> None:
        """Features (B, D) of training images, and their numbers (B,)."""
        self.seen += len(train)
        squared, index = nearest(self.points, F.normalize(train.float(), dim=1), 1)
        distance = squared[:, 0] / 2  # |a - b|^2 = 2 - 2 cos for unit vectors
        nearer = distance < self.distance
        self.distance[nearer] = distance[nearer]
        self.number[nearer] = numbers[index[:, 0][nearer]]

    def together(self) -> tuple[Tensor, Tensor, int]:
        """Over all processes: distances (N,), numbers (N,) and how many training images there were."""
        shares = gathered((self.distance, self.number, self.seen))
        distances, numbers = torch.stack([s[0] for s in shares]), torch.stack([s[1] for s in shares])
        best, rank = distances.min(dim=0)
        return best, numbers.gather(0, rank[None])[0], sum(share[2] for share in shares)


@dataclass(frozen=True)
class Copies:
    """How many samples are suspiciously near to a training image."""

    bar: float  # distance that a share `quantile` of held-out real images falls below
    share: float  # of samples below it
    expected: float  # share of samples below it that held-out images promise
    error: float  # standard error of `share - expected` if samples were held-out images


def copies(samples: Tensor, held_out: Tensor, quantile: float) -> Copies:
    """From the distances of samples (N,) and of held-out real images (M,) to the training set."""
    bar = float(torch.quantile(held_out.double(), quantile))
    error = math.sqrt(quantile * (1 - quantile) * (1 / len(samples) + 1 / len(held_out)))
    return Copies(bar, float((samples.double() < bar).double().mean()), quantile, error)
