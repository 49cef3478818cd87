"""The denoising U-Net of the paper (appendix E.2.1): residual and attention blocks on a pyramid of feature maps.

Shapes: B batch, C channels, h w latent size, E = 4 model_channels, L conditioning tokens, D their width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ldmlab.contracts import Conditioning, Prepared
from ldmlab.errors import InputError
from ldmlab.nn.attention import CrossKV, PixelAttention, SpatialTransformer
from ldmlab.nn.blocks import (
    COORDINATES,
    ChannelsLast,
    Grow,
    ResBlock,
    Shrink,
    TimeMLP,
    conv3,
    double,
    group_norm,
    halve,
    with_coordinates,
    zero,
)
from ldmlab.nn.compiling import region
from ldmlab.nn.positions import number_embedding


class UNetCache(NamedTuple):
    """What does not change between the steps of one sample."""

    kv: list[list[CrossKV]]  # of the tokens, for each spatial transformer in the order they run and each block of it
    vector: Tensor | None  # (B, E) projected vector conditioning


@region
class UNetBlock(nn.Module):
    """A residual block, then attention: none, over pixels, or over pixels and tokens."""

    def __init__(self, res: ResBlock, attention: PixelAttention | SpatialTransformer | None) -> None:
        super().__init__()
        self.res = res
        self.attention = attention

    def forward(self, x: Tensor, emb: Tensor, kv: list[CrossKV] | Tensor | None) -> Tensor:
        x = self.res(x, emb)
        if isinstance(self.attention, SpatialTransformer):
            return self.attention(x, kv)
        return x if self.attention is None else self.attention(x)


class UNetLevel(nn.Module):
    """The blocks of one resolution and the way to the next one."""

    def __init__(self, blocks: list[UNetBlock], resample: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample


@dataclass(frozen=True)
class Blocks:
    """Makers of the blocks of one network, which differ in their widths only."""

    emb_width: int  # E
    dropout: float
    scale_shift: bool
    heads: int | None  # number of attention heads, or
    head_channels: int | None  # width of each
    depth: int = 1  # blocks per spatial transformer
    context_width: int | None = None  # D; None: attention over pixels
    residual_resampling: bool = False
    asymmetric: bool = False
    group: str = "backbone"  # of the options, in messages

    def __post_init__(self) -> None:
        if (self.heads is None) == (self.head_channels is None):
            both = f"{self.group}.heads={self.heads} and {self.group}.head_channels={self.head_channels}"
            raise InputError(f"{both}: give exactly one.")

    def res_block(self, width_in: int, width: int, resample: Callable[..., Tensor] | None = None) -> ResBlock:
        options = {"dropout": self.dropout, "scale_shift": self.scale_shift}
        return ResBlock(width_in, width, self.emb_width, resample=resample, **options)  # type: ignore[arg-type]

    def heads_of(self, width: int) -> int:
        """Number of heads at a level's width."""
        option, divisor = ("heads", self.heads) if self.heads else ("head_channels", self.head_channels or 1)
        if width % divisor:
            raise InputError(
                f"{self.group}.{option}={divisor} does not divide a level of {width} channels; choose a divisor of "
                "every model_channels * channel_mult that has attention, and of the last."
            )
        return self.heads or width // divisor

    def attention(self, width: int) -> PixelAttention | SpatialTransformer:
        heads = self.heads_of(width)
        if self.context_width is None:
            return PixelAttention(width, heads)
        return SpatialTransformer(width, heads, width // heads, self.depth, self.context_width)

    def block(self, width_in: int, width: int, attention: bool) -> UNetBlock:
        return UNetBlock(self.res_block(width_in, width), self.attention(width) if attention else None)

    def shrink(self, width: int) -> nn.Module:
        return self.res_block(width, width, halve) if self.residual_resampling else Shrink(width, self.asymmetric)

    def grow(self, width: int) -> nn.Module:
        return self.res_block(width, width, double) if self.residual_resampling else Grow(width)


class UNet(ChannelsLast):
    """eps(x, t, conditioning) of the official code, every published variant; size of x free, two need not divide it."""

    def __init__(
        self,
        in_channels: int,  # latent plus spatial conditioning; derived in wiring
        out_channels: int,  # of the latent; derived in wiring
        model_channels: int,  # width of the finest level
        channel_mult: Sequence[int],  # width of every level, in multiples of model_channels
        num_res_blocks: int,  # per level on the way down; one more on the way up
        attention_downsampling: Sequence[int],  # levels with attention, by downsampling factor: 1, 2, 4, ...
        heads: int | None = None,  # number of attention heads, or
        head_channels: int | None = None,  # width of each: exactly one of the two
        transformer_depth: int = 1,  # blocks per spatial transformer; with tokens only
        context_width: int | None = None,  # D of the tokens; None: no cross-attention; derived in wiring
        vector_width: int | None = None,  # width of vector conditioning; derived in wiring
        numbers: int = 0,  # embedded beside the time; derived in wiring
        project_vector: bool = True,  # a linear layer for it; False: 4 model_channels wide, added as it is (label_emb)
        dropout: float = 0.0,  # in the residual blocks
        scale_shift: bool = False,  # the time vector scales and shifts norms instead of being added
        residual_resampling: bool = False,  # resample inside residual blocks (BigGAN) instead of by convolution
        coordinates: bool = False,  # channels with positions; not official, but layouts are learned much sooner
        asymmetric_downsampling: bool = False,  # pad right and bottom only where a convolution halves, as DDPM does
        norm_eps: float = 1e-5,  # of the group norms outside spatial transformers; DDPM: 1e-6
        frequency_shift: int = 0,  # of the time embedding's frequencies; DDPM: 1
        gradient_checkpointing: bool = False,  # recompute blocks in the backward pass: less memory, a third more time
    ) -> None:
        super().__init__()
        check_sizes(1, model_channels=model_channels, channel_mult=min(channel_mult, default=0), heads=heads)
        check_sizes(1, head_channels=head_channels, transformer_depth=transformer_depth)
        check_sizes(0, num_res_blocks=num_res_blocks, frequency_shift=frequency_shift)
        _check_rates(dropout, norm_eps, frequency_shift, model_channels // 2)
        self.in_channels, self.out_channels, self.coordinates = in_channels, out_channels, coordinates
        self.context_width, self.vector_width = context_width, vector_width
        self.gradient_checkpointing = gradient_checkpointing
        self.time = TimeMLP(model_channels, frequency_shift)
        self.numbers = number_embedding(numbers, self.time.width)
        self.vector = vector_projection(vector_width, self.time.width, project_vector)
        transformer = heads, head_channels, transformer_depth, context_width
        resampling = residual_resampling, asymmetric_downsampling
        blocks = Blocks(self.time.width, dropout, scale_shift, *transformer, *resampling)
        self._build(blocks, model_channels, channel_mult, num_res_blocks, set(attention_downsampling))
        self._set_epsilon(norm_eps)

    def _build(self, blocks: Blocks, channels: int, channel_mult: Sequence[int], per_level: int, at: set[int]) -> None:
        """The way down, the middle and the way up, where every block meets one feature map left on the way down."""
        widths = [channels * m for m in channel_mult]
        self.conv_in = conv3(self.in_channels + COORDINATES * self.coordinates, channels)
        self.down, skips = nn.ModuleList(), [channels]
        for i, (width_in, width) in enumerate(pairwise([channels, *widths])):
            row = [blocks.block(width if j else width_in, width, 2**i in at) for j in range(per_level)]
            last = i == len(widths) - 1
            self.down.append(UNetLevel(row, None if last else blocks.shrink(width)))
            skips += [width] * (per_level if last else per_level + 1)
        width_in = self.middle_width = widths[-1]
        self.middle = nn.ModuleList(blocks.block(width_in, width_in, attention) for attention in (True, False))
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            row = []
            for _ in range(per_level + 1):
                row.append(blocks.block(width_in + skips.pop(), width, 2**i in at))
                width_in = width
            self.up.append(UNetLevel(row, blocks.grow(width) if i else None))
        self.norm_out = group_norm(widths[0])
        self.conv_out = zero(conv3(widths[0], self.out_channels))

    def _set_epsilon(self, norm_eps: float) -> None:
        for norm in self.modules():
            if isinstance(norm, nn.GroupNorm) and norm.eps == 1e-5:  # those of spatial transformers have 1e-6
                norm.eps = norm_eps

    @property
    def accepts(self) -> frozenset[str]:
        """Slots of the conditioning this network was built for."""
        slots = {"tokens": self.context_width, "vector": self.vector_width, "spatial": self.in_channels}
        return frozenset(slot for slot, width in {**slots, "numbers": self.numbers}.items() if width)

    def aligned(self, block: int | None) -> tuple[nn.Module, int]:
        """See `contracts.Backbone`; the end of the middle."""
        return only_middle(block, self.middle[-1]), self.middle_width

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """Keys and values of the tokens for every block (of one token: its output), and the projected vector."""
        tokens, vector = self._projected(conditioning)
        transformers = [module for module in self.modules() if isinstance(module, SpatialTransformer)]  # as they run
        kv = [] if tokens is None else [transformer.precompute_kv(tokens) for transformer in transformers]
        return Prepared(conditioning, UNetCache(kv, vector))

    def _projected(self, conditioning: Conditioning) -> tuple[Tensor | None, Tensor | None]:
        """Tokens (B, L, D) and the projected vector (B, E)."""
        check_slots("the U-Net", self.accepts, conditioning)
        dtype = self.conv_in.weight.dtype
        tokens, vector = (None if v is None else v.to(dtype) for v in (conditioning.tokens, conditioning.vector))
        return tokens, None if vector is None or self.vector is None else self.vector(vector)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """x (B, C, h, w), t (B,), whole or fractional => (B, out_channels, h, w); weights may be half precision."""
        kv: Iterator[list[CrossKV] | Tensor | None]
        if isinstance(conditioning, Prepared):
            given, vector, kv = conditioning.conditioning, conditioning.cache.vector, iter(conditioning.cache.kv)
        else:  # each block makes its own keys and values
            tokens, vector = self._projected(conditioning)
            given, kv = conditioning, repeat(tokens)
        if given.spatial is not None:
            x = torch.cat([x, given.spatial.to(x.dtype)], dim=1)
        if self.coordinates:
            x = with_coordinates(x)
        emb = self.time(t)  # (B, E)
        if self.numbers is not None:
            emb = emb + self.numbers(given.numbers)
        emb = F.silu(emb if vector is None else emb + vector)

        h = self.conv_in(x.to(self.conv_in.weight.dtype, memory_format=self._layout))
        skips = [h]
        for level in cast(Iterable[UNetLevel], self.down):
            for block in level.blocks:
                h = self._run(block, h, emb, kv)
                skips.append(h)
            if level.resample is not None:
                h = level.resample(h, emb)
                skips.append(h)
        for block in self.middle:
            h = self._run(block, h, emb, kv)
        for level in cast(Iterable[UNetLevel], self.up):
            for block in level.blocks:
                h = self._run(block, torch.cat([h, skips.pop()], dim=1), emb, kv)
            if level.resample is not None:
                h = level.resample(h, emb, tuple(skips[-1].shape[2:]))
        return self.conv_out(F.silu(self.norm_out(h)))

    def _run(self, block: nn.Module, h: Tensor, emb: Tensor, kv: Iterator[list[CrossKV] | Tensor | None]) -> Tensor:
        part = next(kv) if isinstance(block.attention, SpatialTransformer) else None
        return run(self.gradient_checkpointing, block, h, emb, part)


def run(again: bool, block: nn.Module, *inputs: object) -> Any:
    """The block's output; again: recomputed in the backward pass."""
    return checkpoint(block, *inputs, use_reentrant=False) if again and torch.is_grad_enabled() else block(*inputs)


def check_slots(network: str, accepts: frozenset[str], conditioning: Conditioning) -> None:
    """InputError for tokens or a vector that the network lacks or was not built for."""
    for slot in ("tokens", "vector"):
        if (slot in accepts) != (getattr(conditioning, slot) is not None):
            has = "needs" if slot in accepts else "does not take"
            raise InputError(f"{network} {has} {slot} conditioning; change conditioner or backbone.")


def check_sizes(least: int, **sizes: int | None) -> None:
    """InputError for a size below `least`; None is no size."""
    for name, value in sizes.items():
        if value is not None and value < least:
            raise InputError(f"backbone.{name}={value} is less than {least}; give a larger number.")


def _check_rates(dropout: float, norm_eps: float, frequency_shift: int, half: int) -> None:
    if not (0 <= dropout < 1 and norm_eps > 0 and frequency_shift < half):
        raise InputError(
            f"backbone.dropout={dropout}, norm_eps={norm_eps}, frequency_shift={frequency_shift}: dropout is in "
            "0 .. 1, norm_eps is above 0, frequency_shift below half of model_channels."
        )


def vector_projection(width: int | None, time_width: int, project: bool) -> nn.Module | None:
    if not project and width not in (None, time_width):
        raise InputError(
            f"backbone.project_vector=false adds vectors of {width} to a time vector of {time_width}; "
            f"choose width={time_width} for the conditioner, or project_vector=true."
        )
    if width is None:
        return None
    return nn.Linear(width, time_width) if project else nn.Identity()


def only_middle(block: int | None, middle: nn.Module) -> nn.Module:
    """The module; InputError for another block."""
    if block is not None:
        raise InputError(f"alignment.block={block}: of a U-Net its middle is aligned; leave it out.")
    return middle
