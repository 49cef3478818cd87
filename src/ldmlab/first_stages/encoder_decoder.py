"""The paper's convolutional encoder and decoder, shared by the KL and VQ first stages.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, appendix G.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.contracts import Posterior
from ldmlab.errors import InputError
from ldmlab.nn.autoencoder_blocks import Double, Halve, PixelAttention, ResidualBlock, group_norm


@dataclass(frozen=True)
class Architecture:
    """The options that encoder and decoder share."""

    channels: int  # width of the finest level
    channel_mult: Sequence[int]  # width of each level, finest first, as a multiple of `channels`
    num_res_blocks: int  # per level of the encoder; the decoder has one more
    attention_downsampling: Sequence[int]  # levels with attention, by their downsampling: 16 is 16 x 16 of 256 x 256
    mid_attention: bool  # attention between the two middle blocks
    latent_channels: int  # channels between encoder and decoder proper
    norm_groups: int
    dropout: float

    def __post_init__(self) -> None:
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
        return [self.channels * factor for factor in self.channel_mult]

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel and axis, f."""
        return int(2 ** (len(self.channel_mult) - 1))

    def has_attention(self, level: int) -> bool:
        """Whether the blocks of a level (0 is the finest) are each followed by attention."""
        return 2**level in self.attention_downsampling


class ResolutionLevel(nn.Module):
    """The blocks of one resolution, each followed by attention where the level has it, then resampling to the next."""

    def __init__(self, widths: list[int], attention: bool, resample: nn.Module | None, groups: int, drop: float):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(before, after, groups, drop) for before, after in pairwise(widths))
        self.attentions = nn.ModuleList(PixelAttention(width, groups) for width in widths[1:] if attention)
        self.resample = resample if resample is not None else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, D, h / 2 or h or 2 h, ...)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if self.attentions:
                x = self.attentions[index](x)
        return self.resample(x)


class Middle(nn.Module):
    """Two residual blocks at the coarsest level, with optional attention between them."""

    def __init__(self, width: int, attention: bool, groups: int, drop: float) -> None:
        super().__init__()
        self.first = ResidualBlock(width, width, groups, drop)
        self.attention = PixelAttention(width, groups) if attention else nn.Identity()
        self.second = ResidualBlock(width, width, groups, drop)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, C, h, w)."""
        return self.second(self.attention(self.first(x)))


class Encoder(nn.Module):
    """Images to feature maps at 1 / f of their size; levels run from the finest to the coarsest."""

    def __init__(self, arch: Architecture, out_channels: int) -> None:
        super().__init__()
        widths, coarsest = arch.widths, len(arch.widths) - 1
        self.input = nn.Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList()
        for level, width in enumerate(widths):
            chain = [widths[max(level - 1, 0)]] + [width] * arch.num_res_blocks
            resample = Halve(width) if level < coarsest else None
            self.levels.append(
                ResolutionLevel(chain, arch.has_attention(level), resample, arch.norm_groups, arch.dropout)
            )
        self.middle = Middle(widths[-1], arch.mid_attention, arch.norm_groups, arch.dropout)
        self.output_norm = group_norm(widths[-1], arch.norm_groups)
        self.output = nn.Conv2d(widths[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => (B, out_channels, H / f, W / f), in the dtype of the weights."""
        x = self.input(images.to(self.input.weight.dtype))
        for level in self.levels:
            x = level(x)
        return self.output(F.silu(self.output_norm(self.middle(x))))


class Decoder(nn.Module):
    """Feature maps to images at f times their size; levels run from the coarsest to the finest."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        widths = arch.widths[::-1]  # coarsest first
        self.input = nn.Conv2d(arch.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0], arch.mid_attention, arch.norm_groups, arch.dropout)
        self.levels = nn.ModuleList()
        for index, width in enumerate(widths):
            level = len(widths) - 1 - index
            chain = [widths[max(index - 1, 0)]] + [width] * (arch.num_res_blocks + 1)
            resample = Double(width) if level > 0 else None
            self.levels.append(
                ResolutionLevel(chain, arch.has_attention(level), resample, arch.norm_groups, arch.dropout)
            )
        self.output_norm = group_norm(widths[-1], arch.norm_groups)
        self.output = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, latent_channels, h, w) => (B, 3, f h, f w), about [-1, 1]."""
        x = self.middle(self.input(latents))
        for level in self.levels:
            x = level(x)
        return self.output(F.silu(self.output_norm(x)))


@torch.no_grad()
def initialise(network: nn.Module, rule: str) -> None:
    """`torch`: leave the weights as built, as released; `he`: convolutions at deviation sqrt(2 / fan in).

    The default of torch is sqrt(1 / (3 fan in)), too small for deep stacks: with `he` short runs learn much faster.
    Attention keeps its weights. He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 10.
    """
    if rule not in ("torch", "he"):
        raise InputError(f"first_stage.initialisation={rule} is not known; choose torch or he.")
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


class Autoencoder(nn.Module, ABC):
    """Images to features (C' channels) to latents (C channels) and back; subclasses define how features become latents.

    They add `from_latent` after their own way in: the order of parameters is that of optimizer states on disk.
    """

    from_latent: nn.Conv2d

    def __init__(self, arch: Architecture, *, latent_channels: int, encoder_channels: int) -> None:
        super().__init__()
        self.downsampling = arch.downsampling
        self.latent_channels = latent_channels
        self.encoder = Encoder(arch, out_channels=encoder_channels)
        self.decoder = Decoder(arch)

    @abstractmethod
    def posterior_of(self, features: Tensor) -> Posterior:
        """What the encoder gives, (B, C', h, w) => raw latents (B, C, h, w), float32."""

    def features_of(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => what the decoder takes, (B, C', h, w)."""
        return self.from_latent(raw_latents.to(self.from_latent.weight.dtype))

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
