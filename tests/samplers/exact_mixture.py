"""A mixture of two Gaussians: its exact denoiser, and where the probability flow takes a point."""

import math

import torch
from torch import Tensor

from ldmlab.contracts import Level

PARTS = ((0.3, -1.0, 0.4), (0.7, 0.8, 0.5))  # share, mean, deviation
MEAN = sum(share * mean for share, mean, _ in PARTS)
STD = math.sqrt(sum(share * (std**2 + mean**2) for share, mean, std in PARTS) - MEAN**2)


def denoise(x: Tensor, level: Level) -> Tensor:
    """E[clean | x]."""
    logits, means = [], []
    for share, mean, std in PARTS:
        variance = level.alpha**2 * std**2 + level.sigma**2
        distance = x - level.alpha * mean
        logits.append(math.log(share) - 0.5 * math.log(variance) - 0.5 * distance**2 / variance)
        means.append(mean + level.alpha * std**2 / variance * distance)
    return (torch.stack(logits).softmax(0) * torch.stack(means)).sum(0)


def below(x: Tensor, level: Level) -> Tensor:
    """P(X < x) of the noisy mixture."""
    return torch.stack(
        [
            share * torch.special.ndtr((x - level.alpha * mean) / math.hypot(level.alpha * std, level.sigma))
            for share, mean, std in PARTS
        ]
    ).sum(0)


def exact_end(x: Tensor, start: Level, end: Level) -> Tensor:
    """The flow keeps quantiles (one dimension): the point of `end` with as much below it, by bisection."""
    wanted = below(x, start)
    low, high = torch.full_like(x, -10), torch.full_like(x, 10)
    for _ in range(60):
        middle = (low + high) / 2
        above = below(middle, end) < wanted
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return middle
