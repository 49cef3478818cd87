"""Has the model learned pictures by heart? Each sample beside the training picture nearest to it in feature space.

A sample counts as a copy when it is nearer to a training picture than all but the nearest hundredth of held-out real
pictures are: near-twins that exist in the data by nature (variants of one emoji) set the bar, not a fixed number.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.metrics.precision_recall import nearest

_QUANTILE = 0.01


@dataclass(frozen=True)
class Neighbours:
    """Cosine distances in 0 .. 2 and the nearest training pictures."""

    index: Tensor  # (N,) nearest training picture of each sample
    distance: Tensor  # (N,)
    bar: float  # distance that one held-out real picture in a hundred falls below
    copies: float  # share of samples below it
    typical_sample: float  # median distance of samples
    typical_held_out: float  # and of held-out real pictures


def nearest_training_pictures(samples: Tensor, held_out: Tensor, train: Tensor) -> Neighbours:
    """Features (N, D) of samples, of held-out real pictures and of training pictures."""
    samples, held_out, train = (F.normalize(features.float(), dim=1) for features in (samples, held_out, train))
    distance, index = _nearest(samples, train)
    reference, _ = _nearest(held_out, train)
    bar = float(torch.quantile(reference, _QUANTILE))
    return Neighbours(
        index=index,
        distance=distance,
        bar=bar,
        copies=float((distance < bar).double().mean()),
        typical_sample=float(distance.median()),
        typical_held_out=float(reference.median()),
    )


def _nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    squared, index = nearest(points, others, 1)
    return squared[:, 0] / 2, index[:, 0]  # |a - b|^2 = 2 - 2 cos for unit vectors
