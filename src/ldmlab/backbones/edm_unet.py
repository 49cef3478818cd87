"""The U-Nets of EDM (Karras et al. 2022, arXiv 2206.00364, table 7): ADM, DDPM++ and NCSN++.

ADM is Dhariwal & Nichol's network; DDPM++ and NCSN++ are Song et al.'s, which differ in options alone.
Shapes: B batch, C channels, h w latent size, N width of the noise embedding, E width of the embedding.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.backbones.edm2_unet import Role, heads_of, pyramid
from ldmlab.backbones.unet import check_sizes, check_slots, run
from ldmlab.contracts import Conditioning, Prepared
from ldmlab.errors import InputError, one_of
from ldmlab.nn.attention import attend, to_map, to_tokens
from ldmlab.nn.blocks import ChannelsLast, ResBlock, conv3, group_norm, timestep_embedding, zero
from ldmlab.nn.compiling import region
from ldmlab.nn.magnitude import ExactBuffers, Resampling, resample
from ldmlab.nn.positions import number_embedding

_SCALE = 16.0  # of the random frequencies of Fourier features
_SMALL = 1e-5  # of Song's last weights, which are zero in ADM


@dataclass(frozen=True)
class Style:
    """What the blocks of one network share."""

    song: bool
    emb_width: int
    dropout: float
    filter: Sequence[float]  # of resampling

    def norm(self, channels: int) -> nn.GroupNorm:
        return group_norm(channels, 1e-6 if self.song else 1e-5, min(32, channels // 4))


@region
class EdmBlock(nn.Module):
    """A residual block and attention over pixels; Song's sums are divided by sqrt(2)."""

    def __init__(self, width_in: int, width: int, style: Style, resampling: Resampling, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, math.sqrt(0.5) if style.song else 1.0
        still = resampling == "keep"
        self.res = ResBlock(
            width_in, width, style.emb_width, dropout=style.dropout, scale_shift=not style.song, norm=style.norm,
            resample=None if still else partial(resample, mode=resampling, weights=style.filter),
            project=style.song and not still,
        )  # fmt: skip
        if heads:
            self.norm = style.norm(width)
            self.qkv = nn.Linear(width, 3 * width)  # rows: head, then channel, then q | k | v
            self.out = zero(nn.Linear(width, width))

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), emb (B, E), a feature map of x's size from the way down => (B, C', h', w')."""
        x = self.res(x if skip is None else torch.cat([x, skip], dim=1), emb) * self.scale
        if not self.heads:
            return x
        qkv = self.qkv(to_tokens(self.norm(x))).unflatten(2, (self.heads, -1, 3)).transpose(1, 2)  # (B, H, N, d, 3)
        q, k, v = qkv.unbind(4)
        return (x + to_map(self.out(attend(q, k, v)), x)) * self.scale


class Fourier(ExactBuffers):
    """(B,) => (B, channels) float32: cosines, then sines, of 2 pi f t with fixed random f ~ 16 N(0, 1)."""

    frequencies: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("frequencies", _SCALE * torch.randn(channels // 2))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * (2 * math.pi * self.frequencies)
        return torch.cat([angle.cos(), angle.sin()], dim=1)


class EdmCache(NamedTuple):
    """What does not change between the steps of one sample: projections of the vector."""

    early: Tensor | None  # (B, N), added to the noise embedding
    late: Tensor | None  # (B, E), added to the embedding


class EdmUNet(ChannelsLast):
    """F(x, t, conditioning) with the weights of the official networks; t is their c_noise.

    Vectors have unit variance: a class is sqrt(classes) times its one-hot row (`slot: vector`). With `augment_width`
    augmentation labels (appendix F.2) may follow in further columns; without them they are zero: an image as it is.
    """

    def __init__(
        self,
        in_channels: int,  # latent plus spatial conditioning; derived in wiring
        out_channels: int,  # of the latent; derived in wiring
        model_channels: int,  # width of the finest level
        form: str = "adm",  # adm | song (DDPM++ and NCSN++)
        channel_mult: Sequence[int] = (1, 2, 3, 4),  # width of every level, in multiples of model_channels
        num_res_blocks: int = 3,  # per level on the way down; one more on the way up
        attention_downsampling: Sequence[int] = (2, 4, 8),  # by downsampling factor: 1, 2, 4, ...
        middle_attention: bool = True,  # in the first block of the way up, whatever attention_downsampling is
        head_channels: int | None = 64,  # width of a head; None: a single head, as song has
        noise_channels: int | None = None,  # N; None: model_channels
        emb_channels: int | None = None,  # E; None: 4 model_channels
        vector_width: int | None = None,  # of vector conditioning; derived in wiring
        augment_width: int = 0,  # of augmentation labels besides
        numbers: int = 0,  # embedded beside the noise label; derived in wiring
        dropout: float = 0.1,  # in the residual branches
        fourier: bool = False,  # random features of the noise label in place of sinusoids (NCSN++)
        encoder: str = "standard",  # standard | skip | residual (NCSN++): the input, made smaller, joins each level
        decoder: str = "standard",  # standard | skip: outputs of all levels are summed
        resample_filter: Sequence[float] = (1, 1),  # NCSN++: 1, 3, 3, 1
        gradient_checkpointing: bool = False,  # recompute blocks in the backward pass: less memory, a third more time
    ) -> None:
        super().__init__()
        check_sizes(1, model_channels=model_channels, channel_mult=min(channel_mult, default=0))
        check_sizes(1, num_res_blocks=num_res_blocks, head_channels=head_channels, emb_channels=emb_channels)
        check_sizes(0, augment_width=augment_width)
        noise_channels, emb_channels = noise_channels or model_channels, emb_channels or 4 * model_channels
        _check_kinds(form, encoder, decoder)
        _check_numbers(resample_filter, dropout, noise_channels)
        self.in_channels, self.out_channels, self.vector_width = in_channels, out_channels, vector_width
        self.song, self.encoder_kind, self.decoder_kind = form == "song", encoder, decoder
        self.size_step, self.gradient_checkpointing = 2 ** (len(channel_mult) - 1), gradient_checkpointing
        self.head_channels, self.noise_channels, self.augment_width = head_channels, noise_channels, augment_width
        self.style = Style(self.song, emb_channels, dropout, tuple(resample_filter))
        self.fourier = Fourier(noise_channels) if fourier else None
        self.expand, self.mix = nn.Linear(noise_channels, emb_channels), nn.Linear(emb_channels, emb_channels)
        self._make_inputs(noise_channels if self.song else emb_channels, numbers)
        widths = [model_channels * m for m in channel_mult]
        self._build(widths, model_channels, num_res_blocks, set(attention_downsampling), middle_attention)

    def _make_inputs(self, label_to: int, numbers: int) -> None:
        """Layers for numbers and the parts of the vector."""
        self.numbers = number_embedding(numbers, self.mix.out_features)
        self.label = nn.Linear(self.vector_width, label_to, bias=self.song) if self.vector_width else None
        self.augment = nn.Linear(self.augment_width, self.noise_channels, bias=False) if self.augment_width else None

    def _build(self, widths: Sequence[int], model: int, per_level: int, at: set[int], middle_attention: bool) -> None:
        """Song attends in the last block of a level alone on the way up."""
        base = model if self.song else widths[0]
        roles = ("encoder", "exit") if self.song else ("encoder", "decoder", "exit")

        def block(width_in: int, width: int, level: int, role: Role) -> EdmBlock:
            attention = middle_attention if role == "middle" else role in roles and 2**level in at
            heads = heads_of(width, self.head_channels or width) if attention else 0
            return EdmBlock(width_in, width, self.style, role if role in ("down", "up") else "keep", heads)

        self.conv_in = conv3(self.in_channels, base)
        encoder, decoder, self.meets = pyramid(base, widths, per_level, block)
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.inputs = nn.ModuleList()  # of the levels below the first: what the smaller input adds
        for i, width in enumerate(widths[:-1]):
            if self.encoder_kind == "residual":
                pad = 1 + (len(self.style.filter) - 1) // 2
                width_in = self.in_channels if i == 0 else widths[i - 1]
                self.inputs.append(nn.Conv2d(width_in, width, 3, padding=pad))
            elif self.encoder_kind == "skip":
                self.inputs.append(nn.Conv2d(self.in_channels, width, 1))
        shown = widths[::-1] if self.decoder_kind == "skip" else widths[:1]
        self.norms_out = nn.ModuleList(self.style.norm(width) for width in shown)
        self.convs_out = nn.ModuleList(zero(conv3(width, self.out_channels)) for width in shown)
        ends = [(i + 1) * (per_level + 2) for i in range(len(widths))]  # the last block of each level of the way up
        self.exits = ends if self.decoder_kind == "skip" else ends[-1:]
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """ADM: torch's own, zero last layers, normal label weights; Song: Xavier, no biases, small last layers."""
        if not self.song:
            if self.label is not None:
                nn.init.normal_(self.label.weight)
            if self.augment is not None:
                zero(self.augment)
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if self.numbers is not None:
            zero(self.numbers.mix)
        blocks = [module for module in self.modules() if isinstance(module, EdmBlock)]
        attending = [block for block in blocks if block.heads]
        for last in (*self.convs_out, *(block.res.conv_out for block in blocks), *(block.out for block in attending)):
            cast(nn.Conv2d, last).weight.mul_(_SMALL)
        for block in attending:
            block.qkv.weight.mul_(math.sqrt(0.2))

    @property
    def accepts(self) -> frozenset[str]:
        """Slots of the conditioning this network was built for."""
        slots = {"spatial": True, "vector": self.vector_width or self.augment_width, "numbers": self.numbers}
        return frozenset(slot for slot, there in slots.items() if there)

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """The projected vector, and augmentation labels where its columns go on."""
        vector, width, early, late = conditioning.vector, self.vector_width or 0, None, None
        if self.augment is not None:
            labels = self.expand.weight.new_zeros(1, self.augment_width)
            if vector is not None and vector.shape[1] == width + self.augment_width:
                vector, labels = vector.to(labels).tensor_split([width], dim=1)
                vector = vector if width else None
            early = self.augment(labels)
        accepts = self.accepts if width else self.accepts - {"vector"}
        check_slots("the EDM U-Net", accepts, replace(conditioning, vector=vector))
        if self.label is not None and vector is not None:
            vector = vector.to(self.expand.weight.dtype)
            if self.song:
                early = self.label(vector) + (0 if early is None else early)
            else:
                late = self.label(vector / math.sqrt(width))
        return Prepared(conditioning, EdmCache(early, late))

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """x (B, C, h, w), t (B,) => (B, out_channels, h, w); weights may be half precision."""
        prepared = conditioning if isinstance(conditioning, Prepared) else self.prepare(conditioning)
        given = prepared.conditioning
        spatial, emb = given.spatial, self._embedding(t, prepared.cache, given.numbers)  # (B, E)
        x = x if spatial is None else torch.cat([x, spatial.to(x.dtype)], dim=1)
        h, skips = self._down(x.to(self.conv_in.weight.dtype, memory_format=self._layout), emb)
        out, heads = None, iter(zip(self.norms_out, self.convs_out, strict=True))
        for i, (block, meets) in enumerate(zip(self.decoder, self.meets, strict=True)):
            h = run(self.gradient_checkpointing, block, h, emb, *([skips.pop()] if meets else []))
            if i in self.exits:
                norm, conv = next(heads)
                shown = conv(F.silu(norm(h)))
                out = shown if out is None else shown + resample(out, "up", self.style.filter)
        assert out is not None
        return out

    def _down(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The map of the lowest level, and those that the way up meets."""
        h, inputs = self.conv_in(x), iter(self.inputs)
        skips = [h]
        for block in cast(Iterable[EdmBlock], self.encoder):
            h = run(self.gradient_checkpointing, block, h, emb)
            if block.res.resample is not None and self.encoder_kind == "residual":
                h = x = (h + resample(next(inputs)(x), "down", self.style.filter, pad=0)) / math.sqrt(2)
            elif block.res.resample is not None and self.encoder_kind == "skip":
                x = resample(x, "down", self.style.filter)
                h = h + next(inputs)(x)
            skips.append(h)
        return h, skips

    def _embedding(self, t: Tensor, cache: EdmCache, numbers: Tensor | None) -> Tensor:
        """(B, E) after its SiLU; Song has the sines first, and endpoints among the frequencies."""
        if self.fourier is not None:
            emb = self.fourier(t)
        else:
            emb = timestep_embedding(t, self.noise_channels, shift=int(self.song), like=self.expand.weight)
        emb = emb.roll(self.noise_channels // 2, dims=1) if self.song else emb
        emb = emb.to(self.expand.weight.dtype)
        emb = self.mix(F.silu(self.expand(emb if cache.early is None else emb + cache.early)))
        if self.numbers is not None:
            emb = emb + self.numbers(numbers)
        return F.silu(emb if cache.late is None else emb + cache.late)


def _check_kinds(form: str, encoder: str, decoder: str) -> None:
    one_of("backbone.form", form, ("adm", "song"))
    one_of("backbone.encoder", encoder, ("standard", "skip", "residual"))
    one_of("backbone.decoder", decoder, ("standard", "skip"))


def _check_numbers(weights: Sequence[float], dropout: float, noise_channels: int) -> None:
    if sum(weights) == 0 or len(weights) % 2 or not 0 <= dropout < 1 or noise_channels < 4 or noise_channels % 2:
        raise InputError(
            f"backbone: resample_filter={list(weights)} must be of even length and not sum to 0, dropout={dropout} lie "
            f"in 0 .. 1, and noise_channels={noise_channels} be even and above 2."
        )
