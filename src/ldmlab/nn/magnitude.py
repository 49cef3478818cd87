"""Layers that give outputs of unit variance for inputs of unit variance (EDM2: Karras et al. 2024, arXiv 2312.02696).

Equation numbers are that paper's. Shapes: B batch, C channels, h w size of a feature map.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.nn.blocks import double, halve
from ldmlab.nn.compiling import region
from ldmlab.sharded import is_sharded

_EPSILON = 1e-4
Resampling = Literal["keep", "down", "up"]


def normalize(x: Tensor, dims: int | None = None) -> Tensor:
    """x / (1e-4 + rms), the root mean square over `dims`, None: all but the first; in x's dtype."""
    axes = list(range(1, x.ndim)) if dims is None else [dims]
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (_EPSILON + norm / math.sqrt(x.shape[1:].numel() if dims is None else x.shape[dims])).to(x.dtype)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of unit variance (equation 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2) (equation 88)."""
    return a.lerp(b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Channels of a, then of b, which together contribute (1 - t) and t to the next layer (equation 103)."""
    count_a, count_b = a.shape[1], b.shape[1]
    scale = math.sqrt((count_a + count_b) / ((1 - t) ** 2 + t**2))
    return torch.cat([a * (scale * (1 - t) / math.sqrt(count_a)), b * (scale * t / math.sqrt(count_b))], dim=1)


def resample(x: Tensor, mode: Resampling, weights: Sequence[float] = (1, 1), pad: int | None = None) -> Tensor:
    """Half or twice the size by a separable filter of even length; (1, 1) is a mean of 2 x 2 or repeated pixels.

    pad: zeros on each side; None: as many as keep the size even where x's is.
    """
    if mode == "keep":
        return x
    if tuple(weights) == (1, 1):
        return halve(x) if mode == "down" else double(x, (2 * x.shape[2], 2 * x.shape[3]))
    row = torch.tensor(weights, dtype=torch.float32, device=x.device)
    kernel = (torch.outer(row, row) / row.sum() ** 2).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    pad = (len(weights) - 1) // 2 if pad is None else pad
    if mode == "down":
        return F.conv2d(x, kernel, stride=2, padding=pad, groups=x.shape[1])
    return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=pad, groups=x.shape[1])


class ExactBuffers(nn.Module):
    """A module whose buffers stay float32 where weights are made half precision: angles are up to some tens."""

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "ExactBuffers":
        exact = {name: buffer for name, buffer in self.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class MPFourier(ExactBuffers):
    """(B,) => (B, channels), at least float32: sqrt(2) cos(f t + p); f ~ 2 pi N(0, 1) and p are fixed (equation 75)."""

    frequencies: Tensor  # (channels,)
    phases: Tensor  # (channels,)

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return math.sqrt(2) * torch.cos(t[:, None] * self.frequencies + self.phases)


@region  # outside of blocks; sharded networks have its weights in parts when they are made normal
class MPConv(nn.Module):
    """Convolution, or linear layer on the last axis, whose filters have unit magnitude in use (equation 47).

    `force_normal` gives the stored filters unit magnitude too, which training does before every use of changed ones
    (forced weight normalisation, equation 66).
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int | None = None) -> None:  # None: linear
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, *([kernel] * 2 if kernel else [])))
        nn.init.normal_(self.weight)
        self._normal: tuple[int, int] | None = None  # the weight and its version that were last made normal

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        """gain: of the outputs; a learned one has one element."""
        weight = normalize(self.weight.float()) * (gain / math.sqrt(self.weight[0].numel()))
        weight = weight.to(x.dtype)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @torch.no_grad()
    def force_normal(self, again: bool = False) -> None:
        """Once for each change, so that no pass of a step changes the weights of another; `again`: in any case."""
        if again or self._normal != (id(self.weight), self.weight._version):
            weight: Any = self.weight
            weight = weight.to_local() if is_sharded(weight) else weight  # whole filters
            weight.copy_(normalize(weight.float()))
            self._normal = id(self.weight), self.weight._version
