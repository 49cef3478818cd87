"""Blocks of deep-compression first stages: residual, linear attention, and resampling with shortcuts.

Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models", ICLR 2025, section 3.2.
Tensors have the names of diffusers' AutoencoderDC. C, D: channels; H heads of width d.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.errors import InputError, one_of
from ldmlab.nn.blocks import conv3
from ldmlab.nn.compiling import region
from ldmlab.nn.numerics import full_precision

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
}
_EPSILON = 1e-5  # of the norms
_EXPANSION = 4  # of the convolutions behind the attention


class ChannelNorm(nn.Module):
    """RMS norm over the channels of every position: x / sqrt(mean x^2 + 1e-5) weight + bias, in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        spread = torch.rsqrt(x.float().square().mean(dim=1, keepdim=True) + _EPSILON)
        return (x * spread * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms_norm": ChannelNorm,
    "batch_norm": nn.SyncBatchNorm,
}  # the latter over all processes


@region
class ResidualBlock(nn.Module):
    """(B, C, h, w): x + norm(conv2(act(conv1(x))))."""

    def __init__(self, channels: int, norm: str, activation: str) -> None:
        super().__init__()
        self.conv1 = conv3(channels, channels)
        self.act = ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv2(self.act(self.conv1(x))))


class LinearAttention(nn.Module):
    """(B, C, h, w): x + norm(out(attention)) with ReLU linear attention of queries, keys and values at several scales.

    out_i = sum_j (relu(q_i) . relu(k_j)) v_j / sum_j relu(q_i) . relu(k_j), in float32; cost grows with h w.
    Cai et al., "EfficientViT", ICCV 2023, section 3.1.
    """

    def __init__(self, channels: int, head_width: int, kernels: Sequence[int], norm: str) -> None:
        super().__init__()
        if not 1 <= head_width <= channels:
            raise InputError(f"first_stage.attention_head_dim={head_width}: choose 1 to {channels}, the level's width.")
        heads = channels // head_width
        inner, self.head_width = heads * head_width, head_width
        self.to_q, self.to_k, self.to_v = (nn.Conv2d(channels, inner, 1, bias=False) for _ in range(3))
        self.to_qkv_multiscale = nn.ModuleList(self._scale(3 * inner, 3 * heads, kernel) for kernel in kernels)
        self.to_out = nn.Conv2d(inner * (1 + len(kernels)), channels, 1, bias=False)
        self.norm_out = NORMS[norm](channels)

    @staticmethod
    def _scale(channels: int, groups: int, kernel: int) -> nn.Module:
        proj_in = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        proj_out = nn.Conv2d(channels, channels, 1, groups=groups, bias=False)
        return nn.Sequential(OrderedDict(proj_in=proj_in, proj_out=proj_out))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], dim=1)
        scales = torch.cat([first, *(scale(first) for scale in self.to_qkv_multiscale)], dim=1)
        q, k, v = scales.flatten(2).unflatten(1, (-1, 3, self.head_width)).unbind(2)  # (B, H, d, h w)
        attended = relu_attention(q, k, v).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self.norm_out(self.to_out(attended.to(scales.dtype)))


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, d, h w) each => (B, H, d, h w), float32."""
    with full_precision(q):
        q, k, v = q.float().relu(), k.float().relu(), v.float()
        sums = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.transpose(2, 3) @ q  # (B, H, d + 1, h w)
        return sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)


class GatedConvolution(nn.Module):
    """(B, C, h, w): x + norm(point(a silu(b))), a and b the halves of a depthwise convolution of silu(inverted(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = _EXPANSION * channels
        self.conv_inverted = nn.Conv2d(channels, 2 * hidden, 1)
        self.conv_depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.conv_point = nn.Conv2d(hidden, channels, 1, bias=False)
        self.norm = ChannelNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv_depth(F.silu(self.conv_inverted(x))).chunk(2, dim=1)
        return x + self.norm(self.conv_point(a * F.silu(b)))


@region
class EfficientViTBlock(nn.Module):
    """(B, C, h, w): linear attention, then a gated convolution."""

    def __init__(self, channels: int, head_width: int, kernels: Sequence[int], norm: str) -> None:
        super().__init__()
        self.attn = LinearAttention(channels, head_width, kernels, norm)
        self.conv_out = GatedConvolution(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.attn(x))


def averaged(x: Tensor, channels: int) -> Tensor:
    """(B, C, h, w) => (B, channels, h, w): means of neighbouring channels."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def repeated(x: Tensor, channels: int) -> Tensor:
    """(B, C, h, w) => (B, channels, h, w): every channel several times."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


def check_shortcut(large: int, small: int) -> None:
    """InputError where channels cannot be averaged or repeated evenly."""
    if small < 1 or large % small:
        raise InputError(
            f"first_stage: {large} channels are no multiple of {small}, so space and channels cannot be "
            "exchanged; choose widths (block_out_channels, latent_channels) that divide each other, or shortcut=false."
        )


@region
class Down(nn.Module):
    """(B, C, h, w) => (B, D, h / 2, w / 2): a convolution, plus space to channels and means of them as a shortcut."""

    def __init__(self, channels: int, out: int, kind: str, shortcut: bool) -> None:
        super().__init__()
        one_of("first_stage.downsample_block_type", kind, ("pixel_unshuffle", "conv"))
        self.unshuffle, self.shortcut = kind == "pixel_unshuffle", shortcut
        check_shortcut(4 * channels if shortcut else out, out)
        check_shortcut(out if self.unshuffle else 4, 4)
        self.conv = nn.Conv2d(channels, out // 4 if self.unshuffle else out, 3, 1 if self.unshuffle else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = F.pixel_unshuffle(y, 2) if self.unshuffle else y
        return y + averaged(F.pixel_unshuffle(x, 2), y.shape[1]) if self.shortcut else y


@region
class Up(nn.Module):
    """(B, C, h, w) => (B, D, 2 h, 2 w): a convolution, plus repeated channels to space as a shortcut."""

    def __init__(self, channels: int, out: int, kind: str, shortcut: bool) -> None:
        super().__init__()
        one_of("first_stage.upsample_block_type", kind, ("pixel_shuffle", "interpolate"))
        self.interpolate, self.shortcut, self.out = kind == "interpolate", shortcut, out
        check_shortcut(4 * out if shortcut else channels, channels)
        self.conv = conv3(channels, out if self.interpolate else 4 * out)

    def forward(self, x: Tensor) -> Tensor:
        if self.interpolate:
            y = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        else:
            y = F.pixel_shuffle(self.conv(x), 2)
        return y + F.pixel_shuffle(repeated(x, 4 * self.out), 2) if self.shortcut else y
