"""Weights of a loss term by the sizes of two gradients at one layer."""

import torch
from torch import Tensor

from ldmlab.distributed import mean_

_EPSILON = 1e-4


def gradient_ratio(loss: Tensor, term: Tensor, layer: Tensor, limit: float, scale: Tensor | None = None) -> Tensor:
    """|d loss / d layer| / (|d term / d layer| + 1e-4), at most `limit`, without gradient.

    The gradients are averaged over processes before their norms are taken, so the number of processes does not matter;
    float32 throughout, but behind float16 layers, where `scale` keeps small gradients. NaN where one overflows under
    that scale, as the step's own gradient then does, so that it is left out.
    """
    losses = [one if scale is None else one * scale for one in (loss, term)]
    gradients = [torch.autograd.grad(one, layer, retain_graph=True)[0].float() for one in losses]
    norms = mean_(torch.stack(gradients)).flatten(1).norm(dim=1)
    if scale is not None:
        norms = (norms / scale).masked_fill(~norms.isfinite().all(), float("nan"))
    return (norms[0] / (norms[1] + _EPSILON)).clamp(max=limit).detach()
