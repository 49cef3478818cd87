"""The magnitude-preserving U-Net of EDM2 (Karras et al. 2024, arXiv 2312.02696, configuration G).

Shapes: B batch, C channels, h w latent size, E width of the embedding, N = h w.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import check_sizes, check_slots, only_middle, run
from ldmlab.contracts import Conditioning, Prepared
from ldmlab.errors import InputError
from ldmlab.nn.attention import attend, to_map, to_tokens
from ldmlab.nn.blocks import ChannelsLast
from ldmlab.nn.compiling import region
from ldmlab.nn.magnitude import MPConv, MPFourier, Resampling, mp_cat, mp_silu, mp_sum, normalize, resample
from ldmlab.nn.positions import number_embedding


@dataclass(frozen=True)
class Balances:
    """Options that every block of a network shares."""

    residual: float  # weight of a residual branch against its input, 0 .. 1
    attention: float  # likewise of attention
    concat: float  # of the feature maps that come from the way down
    filter: Sequence[float]  # of resampling
    dropout: float
    clip: float | None  # largest magnitude of a block's output


Role = Literal["encoder", "down", "middle", "plain", "up", "decoder", "exit"]  # exit: the last block of a level


def pyramid(
    base: int, widths: Sequence[int], per_level: int, block: Callable[[int, int, int, Role], nn.Module]
) -> tuple[list[nn.Module], list[nn.Module], list[bool]]:
    """Blocks of the way down and of the way up, and which of the latter meet a map of the way down.

    base: width of the first map; block: of two widths, the level and the role. All but those that resample and the
    middle ones meet a map.
    """
    encoder, decoder, meets, skips, width_in, last = [], [], [], [base], base, len(widths) - 1
    for i, width in enumerate(widths):
        if i:
            encoder.append(block(width_in, width_in, i, "down"))
            skips.append(width_in)
        for _ in range(per_level):
            encoder.append(block(width_in, width, i, "encoder"))
            skips.append(width)
            width_in = width
    for i, width in reversed(list(enumerate(widths))):
        between: tuple[Role, ...] = ("up",) if i < last else ("middle", "plain")
        decoder += [block(width_in, width_in, i, role) for role in between]
        meets += [False] * len(between)
        for j in range(per_level + 1):
            decoder.append(block(width_in + skips.pop(), width, i, "exit" if j == per_level else "decoder"))
            meets.append(True)
            width_in = width
    return encoder, decoder, meets


def heads_of(width: int, head_channels: int) -> int:
    """Heads of a level's attention."""
    heads = width // head_channels
    if not heads or width % heads:
        raise InputError(
            f"backbone.head_channels={head_channels} does not fit a level of {width} channels with attention; "
            "choose a divisor of every such width, or attention_downsampling and middle_attention without it."
        )
    return heads


@region
class EDM2Block(nn.Module):
    """x + branch(x), then attention over pixels; every sum keeps the magnitude.

    Encoder: the 1 x 1 convolution and a norm over channels come first; decoder: it is on the way around the branch.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        emb_width: int,
        balances: Balances,
        *,
        decoder: bool = False,
        resampling: Resampling = "keep",
        heads: int = 0,  # of attention; 0: none
    ) -> None:
        super().__init__()
        self.balances, self.decoder, self.resampling, self.heads = balances, decoder, resampling, heads
        self.skip = MPConv(width_in, width, 1) if width_in != width else None
        self.conv_in = MPConv(width_in if decoder else width, width, 3)
        self.emb, self.emb_gain = MPConv(emb_width, width), nn.Parameter(torch.zeros(1))
        self.dropout = nn.Dropout(balances.dropout)
        self.conv_out = MPConv(width, width, 3)
        self.qkv = MPConv(width, 3 * width) if heads else None  # rows: head, then channel, then q | k | v
        self.out = MPConv(width, width) if heads else None

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), emb (B, E), a feature map of x's size from the way down => (B, C', h', w')."""
        if skip is not None:
            x = mp_cat(x, skip, self.balances.concat)
        x = resample(x, self.resampling, self.balances.filter)
        if not self.decoder:
            x = normalize(x if self.skip is None else self.skip(x), 1)
        y = self.conv_in(mp_silu(x))
        y = mp_silu(y * (self.emb(emb, self.emb_gain) + 1)[:, :, None, None].to(y.dtype))
        y = self.conv_out(self.dropout(y))
        if self.decoder and self.skip is not None:
            x = self.skip(x)
        x = mp_sum(x, y, self.balances.residual)
        if self.qkv is not None and self.out is not None:
            qkv = self.qkv(to_tokens(x)).unflatten(2, (self.heads, -1, 3)).transpose(1, 2)  # (B, H, N, d, 3)
            q, k, v = normalize(qkv, 3).unbind(4)
            x = mp_sum(x, to_map(self.out(attend(q, k, v)), x), self.balances.attention)
        return x if self.balances.clip is None else x.clamp(-self.balances.clip, self.balances.clip)


class EDM2UNet(ChannelsLast):
    """F(x, t, conditioning) with the weights of the official U-Net; t is its noise label, log(sigma) / 4 there.

    Inputs have unit variance, vectors too: a class is sqrt(classes) times its one-hot row (`slot: vector`). While
    training, filters that an optimizer has changed get unit magnitude before they are used.
    """

    def __init__(
        self,
        in_channels: int,  # latent plus spatial conditioning; derived in wiring
        out_channels: int,  # of the latent; derived in wiring
        model_channels: int,  # width of the finest level
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # width of every level, in multiples of model_channels
        num_res_blocks: int = 3,  # per level on the way down; one more on the way up
        attention_downsampling: Sequence[int] = (4, 8),  # levels with attention, by downsampling factor: 1, 2, 4, ...
        middle_attention: bool = True,  # in the first block of the way up, whatever attention_downsampling is
        head_channels: int = 64,  # width of a head
        noise_channels: int | None = None,  # of the noise label's Fourier features; None: model_channels
        emb_channels: int | None = None,  # E; None: the widest level
        vector_width: int | None = None,  # of vector conditioning; derived in wiring
        numbers: int = 0,  # embedded beside the noise label; derived in wiring
        dropout: float = 0.0,  # in the residual branches
        vector_balance: float = 0.5,  # weights of sums, 0 .. 1: of the vector beside the noise label
        concat_balance: float = 0.5,  # of maps from the way down
        residual_balance: float = 0.3,  # of residual branches
        attention_balance: float = 0.3,  # of attention
        resample_filter: Sequence[float] = (1, 1),
        clip: float | None = 256.0,  # largest magnitude of a block's output
        gradient_checkpointing: bool = False,  # recompute blocks in the backward pass: less memory, a third more time
    ) -> None:
        super().__init__()
        check_sizes(1, model_channels=model_channels, channel_mult=min(channel_mult, default=0))
        check_sizes(1, head_channels=head_channels, noise_channels=noise_channels, emb_channels=emb_channels)
        check_sizes(0, num_res_blocks=num_res_blocks)
        balances = (vector_balance, concat_balance, residual_balance, attention_balance)
        _check_numbers(balances, resample_filter, clip)
        widths = [model_channels * m for m in channel_mult]
        self.in_channels, self.out_channels, self.vector_width = in_channels, out_channels, vector_width
        self.size_step, self.gradient_checkpointing = 2 ** (len(widths) - 1), gradient_checkpointing
        self.head_channels, self.vector_balance = head_channels, vector_balance
        self.emb_width = emb_channels or max(widths)
        self._make_embedding(noise_channels or model_channels, numbers)
        self.balances = Balances(
            residual_balance, attention_balance, concat_balance, tuple(resample_filter), dropout, clip
        )
        self._build(widths, num_res_blocks, set(attention_downsampling), middle_attention)

    def _make_embedding(self, noise_channels: int, numbers: int) -> None:
        self.fourier, self.noise = MPFourier(noise_channels), MPConv(noise_channels, self.emb_width)
        self.vector = MPConv(self.vector_width, self.emb_width) if self.vector_width else None
        self.numbers = number_embedding(numbers, self.emb_width)

    def _build(self, widths: Sequence[int], per_level: int, at: set[int], middle_attention: bool) -> None:
        def block(width_in: int, width: int, level: int, role: Role) -> EDM2Block:
            attention = role in ("encoder", "decoder", "exit") and 2**level in at
            heads = heads_of(width, self.head_channels) if attention or (role == "middle" and middle_attention) else 0
            resampling: Resampling = role if role in ("down", "up") else "keep"
            decoder = role not in ("encoder", "down")
            return EDM2Block(
                width_in, width, self.emb_width, self.balances, decoder=decoder, resampling=resampling, heads=heads
            )

        first = MPConv(self.in_channels + 1, widths[0], 3)
        self.middle_width = widths[-1]
        encoder, decoder, self.meets = pyramid(widths[0], widths, per_level, block)
        self.encoder, self.decoder = nn.ModuleList([first, *encoder]), nn.ModuleList(decoder)
        self.conv_out, self.gain_out = MPConv(widths[0], self.out_channels, 3), nn.Parameter(torch.zeros(1))

    @property
    def accepts(self) -> frozenset[str]:
        """Slots of the conditioning this network was built for."""
        slots = {"spatial": True, "vector": self.vector_width, "numbers": self.numbers}
        return frozenset(slot for slot, there in slots.items() if there)

    def aligned(self, block: int | None) -> tuple[nn.Module, int]:
        """See `contracts.Backbone`; the end of the middle."""
        return only_middle(block, self.decoder[1]), self.middle_width

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """The projected vector; all weights have unit magnitude from here on while training."""
        check_slots("the EDM2 U-Net", self.accepts, conditioning)
        if self.training:
            self.force_normal()
        vector = conditioning.vector
        return Prepared(conditioning, None if vector is None or self.vector is None else self.vector(vector.float()))

    def force_normal(self, again: bool = False) -> None:
        """Unit magnitude for all filters (forced weight normalisation)."""
        for layer in self.modules():
            if isinstance(layer, MPConv):
                layer.force_normal(again)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """x (B, C, h, w), t (B,) => (B, out_channels, h, w); weights may be half precision."""
        prepared = conditioning if isinstance(conditioning, Prepared) else self.prepare(conditioning)
        given = prepared.conditioning
        spatial, emb = given.spatial, self._embedding(t, prepared.cache, given.numbers)
        parts = [x, *([] if spatial is None else [spatial.to(x.dtype)]), torch.ones_like(x[:, :1])]
        h = torch.cat(parts, dim=1).to(self.noise.weight.dtype, memory_format=self._layout)
        skips = []
        for i, block in enumerate(self.encoder):
            h = run(self.gradient_checkpointing, block, h, emb) if i else block(h)
            skips.append(h)
        for block, meets in zip(self.decoder, self.meets, strict=True):
            h = run(self.gradient_checkpointing, block, h, emb, *([skips.pop()] if meets else []))
        return self.conv_out(h, self.gain_out)

    def _embedding(self, t: Tensor, vector: Tensor | None, numbers: Tensor | None) -> Tensor:
        """(B, E), float32 under autocast too."""
        with torch.autocast(t.device.type, enabled=False):
            emb = self.noise(self.fourier(t))
            if self.numbers is not None:
                emb = emb + self.numbers(numbers).to(emb.dtype)
            return mp_silu(emb if vector is None else mp_sum(emb, vector.to(emb.dtype), self.vector_balance))


def _check_numbers(balances: Sequence[float], resample_filter: Sequence[float], clip: float | None) -> None:
    bounded = clip is None or clip > 0
    if not (bounded and sum(resample_filter) != 0 and all(0 <= balance <= 1 for balance in balances)):
        raise InputError(
            f"backbone: balances {balances} must lie within 0 .. 1, resample_filter={list(resample_filter)} must not "
            f"sum to 0, and clip={clip} must be above 0 or null; choose for instance 0.5, [1,1] and 256."
        )
