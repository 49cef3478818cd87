"""Building blocks of the paper's autoencoder: residual block, one-head attention, resampling by two."""

import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError
from ldmlab.nn.attention import attend
from ldmlab.nn.blocks import grow

_EPSILON = 1e-6  # group norm throughout the autoencoder; the U-Net's res blocks use 1e-5


def group_norm(channels: int, groups: int) -> nn.GroupNorm:
    """Group norm over `groups` groups of channels."""
    if channels % groups:
        raise InputError(
            f"norm_groups={groups} does not divide a width of {channels} channels; "
            "choose a divisor of every width channels * channel_mult."
        )
    return nn.GroupNorm(groups, channels, eps=_EPSILON)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1 convolution on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels, groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels, groups)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, D, h, w)."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(x) + hidden


class PixelAttention(nn.Module):
    """Every position attends to every other with one head; fused, so memory grows with h w and not with its square."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, C, h, w)."""
        hidden = self.norm(x)
        query, key, value = (_as_tokens(conv(hidden)) for conv in (self.query, self.key, self.value))
        attended = attend(query, key, value)  # (B, h w, C)
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


def _as_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) => (B, 1, h w, C), contiguous as the fused kernels need it; free of a copy for channels-last."""
    return x.flatten(2).transpose(1, 2).contiguous()[:, None]


class Halve(nn.Module):
    """A 3x3 convolution of stride 2 that pads the right and bottom edges only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, C, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Double(nn.Module):
    """Nearest neighbour to twice the size, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, C, 2 h, 2 w)."""
        return grow(x, self.conv.weight, self.conv.bias)
