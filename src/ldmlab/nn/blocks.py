"""Building blocks of the networks: norm, residual block, resampling, time embedding, coordinates.

All keep the memory layout they are given, and all work at sizes that two does not divide: shrinking rounds up,
growing is cropped to the size of the skip connection it will meet.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.errors import InputError
from ldmlab.nn.compiling import region

M = TypeVar("M", bound=nn.Module)
Size = tuple[int, int]


class GroupNorm(nn.GroupNorm):
    """Group norm that keeps x's dtype under autocast of a GPU, whose own rule is float32; sums are float32 anyway.

    Compiled, as networks on a GPU are, it keeps channels-last too; torch's own kernel copies such maps there and back.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not _under_cuda_autocast(x):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """Layer norm that keeps x's dtype, as `GroupNorm` does."""

    def forward(self, x: Tensor) -> Tensor:
        if not _under_cuda_autocast(x):
            return super().forward(x)
        weight, bias = (None if p is None else p.to(x.dtype) for p in (self.weight, self.bias))
        with torch.autocast("cuda", enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """RMS norm that keeps x's dtype, as `GroupNorm` does."""

    def forward(self, x: Tensor) -> Tensor:
        if not _under_cuda_autocast(x):
            return super().forward(x)
        with torch.autocast("cuda", enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def _under_cuda_autocast(x: Tensor) -> bool:
    return x.is_cuda and torch.is_autocast_enabled("cuda")


def group_norm(channels: int, eps: float = 1e-5, groups: int = 32) -> nn.GroupNorm:
    """Group norm of widths that `groups` divides."""
    if channels % groups:
        raise InputError(
            f"{channels} channels do not split into norm_groups={groups}; use multiples of {groups} as widths, "
            "channels * channel_mult, or other norm_groups where that is an option."
        )
    return GroupNorm(groups, channels, eps=eps)


class ChannelsLast(nn.Module):
    """A network whose weights are channels-last on a GPU; on a CPU that layout was measured 12 % slower."""

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> "ChannelsLast":
        super()._apply(fn, recurse)
        for parameter in self.parameters():
            if parameter.ndim == 4 and parameter.is_cuda:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    @property
    def _layout(self) -> torch.memory_format:
        """The layout of the weights, which feature maps follow."""
        weight = next(parameter for parameter in self.parameters() if parameter.ndim == 4)
        last = torch.channels_last  # on a GPU also where the weights are sharded, which are gathered contiguous
        return last if weight.is_cuda or weight.is_contiguous(memory_format=last) else torch.contiguous_format


def zero(module: M) -> M:
    """The module with all its parameters at zero: a residual branch that starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3(channels_in: int, channels_out: int) -> nn.Conv2d:
    """3 x 3 convolution with zero padding of one pixel on every side."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


def halve(x: Tensor) -> Tensor:
    """Mean of 2 x 2 pixels; an odd last row or column is averaged on its own: (B, C, ceil(h / 2), ceil(w / 2))."""
    return F.avg_pool2d(x, 2, ceil_mode=True)


def double(x: Tensor, size: Size) -> Tensor:
    """Every pixel twice in both directions, cropped to `size`: (B, C, *size)."""
    height, width = size
    return F.interpolate(x, scale_factor=2.0, mode="nearest")[:, :, :height, :width]


def grow(x: Tensor, weight: Tensor, bias: Tensor | None, size: Size | None = None) -> Tensor:
    """conv3(double(x)) cropped to `size`: (B, C, h, w) => (B, C', *size or 2 h, 2 w).

    Doubling repeats pixels, so every output pixel sees 2 x 2 different ones: a transposed convolution of stride 2 with
    a 4 x 4 kernel is the same in 4 / 9 of the products. Making its kernel takes time, so small maps go the long way.
    """
    height, width = size or (2 * x.shape[2], 2 * x.shape[3])
    if x.shape[2] * x.shape[3] < weight.shape[0] or (height, width) != (2 * x.shape[2], 2 * x.shape[3]):
        return F.conv2d(double(x, (height, width)), weight, bias, padding=1)
    rows = F.pad(weight, (0, 0, 0, 1)) + F.pad(weight, (0, 0, 1, 0))  # (C', C, 4, 3)
    kernel = (F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))).flip(2, 3)  # (C', C, 4, 4)
    return F.conv_transpose2d(x, kernel.transpose(0, 1), bias, stride=2, padding=1)


@region
class Shrink(nn.Module):
    """Stride-2 convolution: (B, C, h, w) => (B, C, ceil(h / 2), ceil(w / 2)).

    Padding is one zero on every side, or, with `asymmetric`, on the right and at the bottom only.
    """

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)
        self.asymmetric = asymmetric

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        return self.conv(F.pad(x, (0, 1 + width % 2, 0, 1 + height % 2)) if self.asymmetric else x)


@region
class Grow(nn.Module):
    """Nearest neighbour times two, then a convolution: (B, C, h, w) => (B, C, *size or 2 h, 2 w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor, emb: Tensor | None = None, size: Size | None = None) -> Tensor:
        return grow(x, self.conv.weight, self.conv.bias, size)


@region
class ResBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + time))), the last convolution starting at zero.

    With `scale_shift` the time vector scales and shifts the second norm instead of being added before it.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb_width: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Callable[..., Tensor] | None = None,  # halve | double, applied in the branch and on the way around it
        norm: Callable[[int], nn.Module] = group_norm,
        project: bool = False,  # a 1 x 1 convolution on the way around where the width stays, too
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm_in = norm(channels_in)
        self.conv_in = conv3(channels_in, channels_out)
        self.emb = nn.Linear(emb_width, 2 * channels_out if scale_shift else channels_out)
        self.norm_out = norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(conv3(channels_out, channels_out))
        project = project or channels_in != channels_out
        self.skip = nn.Conv2d(channels_in, channels_out, 1) if project else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, size: Size | None = None) -> Tensor:
        """x (B, C, h, w), emb (B, E) after its SiLU => (B, C', h', w'); `size` is for a growing block."""
        h = F.silu(self.norm_in(x))
        if self.resample is not None:
            target = () if size is None else (size,)
            h, x = self.resample(h, *target), self.resample(x, *target)
        h = self.conv_in(h)
        e = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, dim=1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + e)
        return self.skip(x) + self.conv_out(self.dropout(F.silu(h)))


def timestep_embedding(
    t: Tensor, width: int, max_period: float = 10_000.0, shift: int = 0, like: Tensor | None = None
) -> Tensor:
    """(B,) times => (B, width): cosines first, then sines, of t max_period^(-i / (half - shift)).

    half = width // 2, i = 0 .. half - 1; Vaswani et al. 2017, section 3.5, as the official code orders it. An odd width
    ends in a zero. Computed in float32, or in float64 if `like` is, and given in the dtype of `like` (None: float32).
    """
    half = width // 2
    dtype = torch.float32 if like is None else torch.promote_types(like.dtype, torch.float32)
    rate = -math.log(max_period) / (half - shift)
    frequency = torch.exp(torch.arange(half, dtype=dtype, device=t.device) * rate)
    angle = t.to(dtype)[:, None] * frequency[None, :]
    embedding = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    embedding = F.pad(embedding, (0, 1)) if width % 2 else embedding
    return embedding if like is None else embedding.to(like.dtype)


class TimeMLP(nn.Module):
    """(B,) times => (B, 4 channels): sinusoids, linear, SiLU, linear."""

    def __init__(self, channels: int, shift: int = 0) -> None:
        super().__init__()
        self.channels, self.shift = channels, shift
        self.width = 4 * channels
        self.expand = nn.Linear(channels, self.width)
        self.mix = nn.Linear(self.width, self.width)

    def forward(self, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.channels, shift=self.shift, like=self.expand.weight)
        return self.mix(F.silu(self.expand(embedding)))


class MLP(nn.Module):
    """out(gelu(expand(x))) with the tanh form of GELU, four times as wide as x."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.expand = nn.Linear(width, int(width * ratio))
        self.out = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.expand(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """out(silu(a) b), where a and b are the halves of expand(x), each 2 / 3 as wide as in `MLP` (Shazeer 2020)."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(width * ratio))
        self.expand = nn.Linear(width, 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.expand(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


def pooled_first(pooled: Tensor, tokens: Tensor) -> Tensor:
    """A vector (B, W) in the first ceil(W / D) of the tokens (B, L, D), filled up with zeros."""
    width = tokens.shape[2]
    rows = F.pad(pooled, (0, -pooled.shape[1] % width)).unflatten(1, (-1, width))
    return torch.cat([rows.to(tokens.dtype), tokens], dim=1)


COORDINATES = 2


def with_coordinates(x: Tensor) -> Tensor:
    """x (B, C, h, w) => (B, C + 2, h, w): after x, row and column of each cell's centre from -1 to 1 at the borders."""
    height, width = x.shape[2:]
    centres = [(2 * torch.arange(side, device=x.device) + 1) / side - 1 for side in (height, width)]
    places = torch.stack(torch.meshgrid(centres, indexing="ij")).to(x.dtype)  # (2, h, w)
    return torch.cat([x, places.expand(len(x), -1, -1, -1)], dim=1)
