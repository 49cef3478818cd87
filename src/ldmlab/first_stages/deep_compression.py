"""Deep-compression first stages (DC-AE): f = 32, 64 and 128 by shortcuts between space and channels.

Chen et al., "Deep Compression Autoencoder for Efficient High-Resolution Diffusion Models", ICLR 2025, section 3.2.
Options and tensors have the names of diffusers' AutoencoderDC.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ldmlab.contracts import Posterior
from ldmlab.errors import InputError, one_of
from ldmlab.first_stages.deep_compression_blocks import (
    ACTIVATIONS,
    NORMS,
    ChannelNorm,
    Down,
    EfficientViTBlock,
    ResidualBlock,
    Up,
    averaged,
    check_shortcut,
    repeated,
)
from ldmlab.first_stages.encoder_decoder import WithoutSpread, check_image_size, initialise
from ldmlab.nn.blocks import conv3

_BLOCKS = ("ResBlock", "EfficientViTBlock")


@dataclass(frozen=True)
class Levels:
    """Options of one network, an entry a level, the finest first; one word stands for all levels."""

    side: str  # encoder | decoder
    head_width: int
    widths: Sequence[int]
    depths: Sequence[int]
    kinds: str | Sequence[str]
    kernels: Sequence[Sequence[int]]
    norms: str | Sequence[str] = "rms_norm"
    activations: str | Sequence[str] = "silu"

    def __post_init__(self) -> None:
        count = len(self.widths)
        known = {"kinds": _BLOCKS, "norms": NORMS, "activations": ACTIVATIONS, "depths": (), "kernels": ()}
        for name, choices in known.items():
            value = getattr(self, name)
            object.__setattr__(self, name, each := [value] * count if isinstance(value, str) else list(value))
            if len(each) != count:
                raise InputError(
                    f"first_stage: {count} levels of the {self.side}, but {name}={each}; give one a level."
                )
            for entry in each if choices else ():
                one_of(f"first_stage: {self.side} {name}", entry, choices)
        if min(self.depths[1:-1], default=1) < 1 or self.depths == [0]:
            raise InputError(
                f"first_stage.{self.side}_layers_per_block={self.depths} leaves a level without blocks; only the first "
                "and the last of several may have 0."
            )
        for width, kind in zip(self.widths, self.kinds, strict=True):
            if kind == "EfficientViTBlock" and width < self.head_width:
                raise InputError(f"first_stage.attention_head_dim={self.head_width} is wider than a level of {width}.")

    @property
    def outer(self) -> int:
        """Width next to the pixels."""
        return self.widths[0] if self.depths[0] else self.widths[1]

    def after(self, level: int) -> list[int]:
        """The width of the next coarser level where this one resamples, else nothing."""
        return list(self.widths[level + 1 : level + 2]) if self.depths[level] else []

    def blocks(self, level: int) -> list[nn.Module]:
        width, norm, count = self.widths[level], self.norms[level], self.depths[level]
        if self.kinds[level] == "ResBlock":
            return [ResidualBlock(width, norm, self.activations[level]) for _ in range(count)]
        return [EfficientViTBlock(width, self.head_width, self.kernels[level], norm) for _ in range(count)]


class DeepEncoder(nn.Module):
    """Images (B, 3, H, W) => (B, C, H / f, W / f)."""

    def __init__(self, o: Levels, latent_channels: int, kind: str, shortcut: bool, out_shortcut: bool) -> None:
        super().__init__()
        self.conv_in = conv3(3, o.outer) if o.depths[0] else Down(3, o.outer, kind, shortcut=False)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(o.widths):
            down = [Down(width, after, kind, shortcut) for after in o.after(level)]
            self.down_blocks.append(nn.Sequential(*o.blocks(level), *down))
        self.conv_out = conv3(o.widths[-1], latent_channels)
        self.out_shortcut = out_shortcut
        if out_shortcut:
            check_shortcut(o.widths[-1], latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x.to(self.conv_out.weight.dtype))
        for blocks in self.down_blocks:
            x = blocks(x)
        y = self.conv_out(x)
        return y + averaged(x, y.shape[1]) if self.out_shortcut else y


class DeepDecoder(nn.Module):
    """(B, C, h, w) => images (B, 3, f h, f w)."""

    def __init__(
        self, o: Levels, latent_channels: int, kind: str, shortcut: bool, in_shortcut: bool, activation: str
    ) -> None:
        super().__init__()
        one_of("first_stage.decoder_conv_act_fn", activation, ACTIVATIONS)
        self.conv_in = conv3(latent_channels, o.widths[-1])
        self.in_shortcut = in_shortcut
        if in_shortcut:
            check_shortcut(o.widths[-1], latent_channels)
        self.up_blocks = nn.ModuleList()  # the finest first; they run backwards
        for level, width in enumerate(o.widths):
            up = [Up(after, width, kind, shortcut) for after in o.after(level)]
            self.up_blocks.append(nn.Sequential(*up, *o.blocks(level)))
        self.norm_out = ChannelNorm(o.outer)
        self.conv_act = ACTIVATIONS[activation]()
        self.conv_out = conv3(o.outer, 3) if o.depths[0] else Up(o.outer, 3, kind, shortcut=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.conv_in.weight.dtype)
        y = self.conv_in(x)
        y = y + repeated(x, y.shape[1]) if self.in_shortcut else y
        for blocks in reversed(self.up_blocks):
            y = blocks(y)
        return self.conv_out(self.conv_act(self.norm_out(y)))


class DeepCompressionAutoencoder(WithoutSpread):
    """Images to latents without spread and back, f = 2^(levels - 1); no penalty.

    Options of two networks, an entry a level, the finest first; one word stands for all levels.
    """

    idle_without = "encoder_out_shortcut decoder_in_shortcut: shortcut"

    def __init__(
        self,
        *,
        latent_channels: int,
        encoder_block_out_channels: Sequence[int],  # width of each level
        decoder_block_out_channels: Sequence[int],
        encoder_layers_per_block: Sequence[int],  # blocks of each level; 0 at first: the network starts at half size
        decoder_layers_per_block: Sequence[int],
        encoder_block_types: str | Sequence[str],  # ResBlock | EfficientViTBlock
        decoder_block_types: str | Sequence[str],
        encoder_qkv_multiscales: Sequence[Sequence[int]],  # further scales of the attention, by their kernels
        decoder_qkv_multiscales: Sequence[Sequence[int]],
        attention_head_dim: int = 32,  # width of a head
        downsample_block_type: str = "pixel_unshuffle",  # pixel_unshuffle | conv
        upsample_block_type: str = "pixel_shuffle",  # pixel_shuffle | interpolate
        decoder_norm_types: str | Sequence[str] = "rms_norm",  # rms_norm | batch_norm
        decoder_act_fns: str | Sequence[str] = "silu",  # of residual blocks: silu | swish | relu | gelu | mish
        decoder_conv_act_fn: str = "relu",  # before the last convolution
        encoder_out_shortcut: bool = True,  # means of channels around the encoder's last convolution
        decoder_in_shortcut: bool = True,  # repeated channels around the decoder's first convolution
        shortcut: bool = True,  # False: no shortcut between space and channels anywhere, for comparison
        initialisation: str = "torch",  # of the convolutions: torch | he, for short runs
    ) -> None:
        super().__init__()
        count = len(encoder_block_out_channels)
        if count != len(decoder_block_out_channels):
            raise InputError(
                f"first_stage: {count} levels of the encoder, but decoder_block_out_channels="
                f"{list(decoder_block_out_channels)}; both need the same number."
            )
        self.downsampling, self.latent_channels = 2 ** (count - 1), latent_channels
        own = encoder_block_out_channels, encoder_layers_per_block, encoder_block_types, encoder_qkv_multiscales
        levels = Levels("encoder", attention_head_dim, *own)
        ends = shortcut and encoder_out_shortcut
        self.encoder = DeepEncoder(levels, latent_channels, downsample_block_type, shortcut, ends)
        own = decoder_block_out_channels, decoder_layers_per_block, decoder_block_types, decoder_qkv_multiscales
        levels = Levels("decoder", attention_head_dim, *own, decoder_norm_types, decoder_act_fns)
        how = upsample_block_type, shortcut, shortcut and decoder_in_shortcut, decoder_conv_act_fn
        self.decoder = DeepDecoder(levels, latent_channels, *how)
        initialise(self, initialisation)

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => raw latents (B, C, H / f, W / f), float32."""
        check_image_size(images, self.downsampling)
        return Posterior(self.encoder(images).float())

    @property
    def last_layer(self) -> Tensor:
        """Weight of the convolution that gives the pixels."""
        end = self.decoder.conv_out
        return end.conv.weight if isinstance(end, Up) else end.weight

    @property
    def encoder_last_layer(self) -> Tensor:
        """Weight of the convolution that gives the latents."""
        return self.encoder.conv_out.weight
