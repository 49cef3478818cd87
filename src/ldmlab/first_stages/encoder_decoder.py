"""The paper's convolutional encoder and decoder, shared by the KL and VQ first stages.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, appendix G.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.errors import InputError, check_fraction, one_of
from ldmlab.nn.attention import attend
from ldmlab.nn.blocks import Grow, Shrink, group_norm
from ldmlab.nn.compiling import region
from ldmlab.values import LatentChange

_EPSILON = 1e-6  # group norm throughout the autoencoder; the U-Net's residual blocks use 1e-5


@dataclass(frozen=True)
class Architecture:
    """The options that encoder and decoder share."""

    channels: int  # width of the finest level
    channel_mult: Sequence[float]  # width of each level, finest first, as a multiple of `channels`
    num_res_blocks: int  # per level of the encoder; the decoder has one more
    attention_downsampling: Sequence[int]  # levels with attention, by their downsampling: 16 is 16 x 16 of 256 x 256
    mid_attention: bool  # attention between the two middle blocks
    latent_channels: int  # channels between encoder and decoder proper
    norm_groups: int
    dropout: float

    def __post_init__(self) -> None:
        check_fraction("first_stage.dropout", self.dropout)
        if self.channels < 1:
            raise InputError(f"first_stage.channels={self.channels} must be at least 1.")
        widths = [self.channels * factor for factor in self.channel_mult]
        if not all(1 <= width < math.inf and abs(width - round(width)) < 1e-6 for width in widths):
            raise InputError(
                f"first_stage.channel_mult={list(self.channel_mult)} with channels={self.channels} gives widths that "
                "are no whole numbers above 0; choose multiples such as [1, 1.5, 2] that do."
            )
        factors = [2**level for level in range(len(self.channel_mult))]
        wrong = [factor for factor in self.attention_downsampling if factor not in factors]
        if wrong:
            raise InputError(
                f"first_stage.attention_downsampling={list(self.attention_downsampling)} names {wrong[0]}, "
                f"which no level has; choose among {factors}."
            )

    @property
    def widths(self) -> list[int]:
        """Channels of each level, finest first."""
        return [round(self.channels * factor) for factor in self.channel_mult]

    def norm(self, width: int) -> nn.GroupNorm:
        return group_norm(width, _EPSILON, self.norm_groups)


@region
class ResidualBlock(nn.Module):
    """(B, C, h, w) => (B, D, h, w): x + conv(silu(norm(conv(silu(norm(x)))))), a 1x1 convolution on x if D is not C."""

    def __init__(self, arch: Architecture, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = arch.norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = arch.norm(out_channels)
        self.dropout = nn.Dropout(arch.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(self.dropout(F.silu(self.norm2(hidden))))
        return self.shortcut(x) + hidden


@region
class PixelAttention(nn.Module):
    """Every position attends to every other with one head; fused, so memory grows with h w and not with its square."""

    def __init__(self, arch: Architecture, channels: int) -> None:
        super().__init__()
        self.norm = arch.norm(channels)
        self.query = nn.Conv2d(channels, channels, 1)
        self.key = nn.Conv2d(channels, channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)
        maps = [conv(hidden) for conv in (self.query, self.key, self.value)]
        # (B, 1, h w, C), contiguous as the fused kernels need it; free of a copy for channels-last
        attended = attend(*(each.flatten(2).transpose(1, 2).contiguous()[:, None] for each in maps))  # (B, h w, C)
        return x + self.out(attended.transpose(1, 2).reshape(x.shape))


class ResolutionLevel(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it, then resampling to the next."""

    def __init__(self, arch: Architecture, level: int, widths: list[int], resample: nn.Module | None) -> None:
        super().__init__()
        attention = 2**level in arch.attention_downsampling
        self.blocks = nn.ModuleList(ResidualBlock(arch, before, after) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(PixelAttention(arch, width) for width in widths[1:] if attention)
        self.resample = resample if resample is not None else nn.Identity()

    def pieces(self) -> list[nn.Module]:
        """In the order in which they run."""
        if not self.attentions:
            return [*self.blocks, self.resample]
        pairs = zip(self.blocks, self.attentions, strict=True)
        return [*(piece for pair in pairs for piece in pair), self.resample]


class Middle(nn.Module):
    """Two residual blocks at the coarsest level, with optional attention between them."""

    def __init__(self, arch: Architecture, width: int) -> None:
        super().__init__()
        self.first = ResidualBlock(arch, width, width)
        self.attention = PixelAttention(arch, width) if arch.mid_attention else nn.Identity()
        self.second = ResidualBlock(arch, width, width)

    def pieces(self) -> list[nn.Module]:
        """In the order in which they run."""
        return [self.first, self.attention, self.second]


@partial(region, method="head")
class Network(nn.Module):
    """The encoder, images (B, 3, H, W) in [-1, 1] => (B, C, H / f, W / f), or its mirror image, the decoder.

    Levels run from the finest to the coarsest, in a decoder from the coarsest to the finest.
    """

    def __init__(self, arch: Architecture, in_channels: int, out_channels: int, *, decodes: bool) -> None:
        super().__init__()
        order = list(range(len(arch.widths)))[:: -1 if decodes else 1]
        widths = [arch.widths[level] for level in order]
        self.decodes = decodes
        self.input = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        if decodes:
            self.middle = Middle(arch, widths[0])
        self.levels = nn.ModuleList()
        for level, before, width in zip(order, [widths[0], *widths[:-1]], widths, strict=True):
            resample = None if level == order[-1] else Grow(width) if decodes else Shrink(width, asymmetric=True)
            chain = [before] + [width] * (arch.num_res_blocks + decodes)
            self.levels.append(ResolutionLevel(arch, level, chain, resample))
        if not decodes:
            self.middle = Middle(arch, widths[-1])
        self.output_norm = arch.norm(widths[-1])
        self.output = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def pieces(self) -> list[nn.Module]:
        """From the input to the last feature map, in the order in which they run."""
        parts: list[Any] = [self.middle, *self.levels] if self.decodes else [*self.levels, self.middle]
        return [self.input, *(piece for part in parts for piece in part.pieces())]

    def head(self, x: Tensor) -> Tensor:
        """The last feature map => the output."""
        return self.output(F.silu(self.output_norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        """In the dtype of the weights, whatever that of x."""
        x = x.to(self.input.weight.dtype)
        for piece in self.pieces():
            x = piece(x)
        return self.head(x)


@torch.no_grad()
def initialise(network: nn.Module, rule: str) -> None:
    """`torch`: leave the weights as built, as released; `he`: convolutions at deviation sqrt(2 / fan in).

    The default of torch is sqrt(1 / (3 fan in)), too small for deep stacks: with `he` short runs learn much faster.
    Attention keeps its weights. He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 10.
    """
    one_of("first_stage.initialisation", rule, ("torch", "he"))
    if rule == "torch" or isinstance(network, PixelAttention):
        return
    if isinstance(network, nn.Conv2d):
        network.weight.mul_(math.sqrt(6.0))
    for child in network.children():
        initialise(child, rule)


def check_image_size(images: Tensor, downsampling: int) -> None:
    """Refuse images whose height or width the downsampling does not divide."""
    height, width = images.shape[-2:]
    if height % downsampling or width % downsampling:
        fitting = [max(side // downsampling, 1) * downsampling for side in (height, width)]
        raise InputError(
            f"image size {height}x{width} is not divisible by the first stage's downsampling f={downsampling}; "
            f"choose a multiple of {downsampling}, for instance {fitting[0]}x{fitting[1]}."
        )


class WithoutSpread(nn.Module, ABC):
    """A first stage whose latents have no spread, with no penalty; subclasses encode, and set `decoder`."""

    uses_noise = False
    decoder: Any

    @abstractmethod
    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => raw latents (B, C, H / f, W / f), float32."""

    def decode(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, 3, f h, f w), about [-1, 1]."""
        return self.decoder(raw_latents)

    def reconstruct(self, images: Tensor, noise: Tensor, change: LatentChange | None = None) -> Reconstruction:
        """Encode, `change` where given, decode (the noise is not used); no penalties."""
        latents = self.encode(images).mean
        return Reconstruction(self.decode(latents if change is None else change(latents)), {}, latents=latents)


class Autoencoder(nn.Module, ABC):
    """Images to features (C' channels) to latents (C channels) and back; subclasses define how features become latents.

    They add `from_latent` after their own way in: the order of parameters is that of optimizer states on disk.
    """

    from_latent: nn.Module

    def __init__(self, arch: Architecture, *, latent_channels: int, encoder_channels: int) -> None:
        super().__init__()
        self.downsampling = 2 ** (len(arch.channel_mult) - 1)  # f, image pixels per latent pixel and axis
        self.latent_channels = latent_channels
        self.encoder = Network(arch, 3, encoder_channels, decodes=False)
        self.decoder = Network(arch, arch.latent_channels, 3, decodes=True)

    @abstractmethod
    def posterior_of(self, features: Tensor) -> Posterior:
        """What the encoder gives, (B, C', h, w) => raw latents (B, C, h, w), float32."""

    def features_of(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => what the decoder takes, (B, C', h, w)."""
        return self.from_latent(raw_latents.to(self.decoder.input.weight.dtype))

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => raw latents (B, C, H / f, W / f), float32."""
        check_image_size(images, self.downsampling)
        return self.posterior_of(self.encoder(images))

    def decode(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, 3, f h, f w), about [-1, 1]."""
        return self.decoder(self.features_of(raw_latents))

    @property
    def last_layer(self) -> Tensor:
        """Weight of the convolution that gives the pixels."""
        return self.decoder.output.weight

    @property
    def encoder_last_layer(self) -> Tensor:
        """Weight of the convolution that gives the features."""
        return self.encoder.output.weight
