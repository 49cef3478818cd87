"""Diffusion transformers: DiT (Peebles and Xie 2023), SiT (Ma et al. 2024), LightningDiT (Yao et al. 2025).

Shapes: B batch, C latent channels, h w latent size, p side of a patch, N = (h / p) (w / p) patches, D width of the
network, L tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.backbones.tokens import (
    EPSILON,
    TIME_CHANNELS,
    TokenRoute,
    chosen_block,
    gained_norm,
    modulate,
    plain_norm,
    returned,
    taken,
    unpatched,
)
from ldmlab.backbones.unet import check_sizes, check_slots, run, vector_projection
from ldmlab.contracts import Conditioning, Prepared
from ldmlab.errors import InputError, one_of
from ldmlab.nn.attention import KeysValues, TokenAttention, attend
from ldmlab.nn.blocks import MLP, LayerNorm, SwiGLU, timestep_embedding, zero
from ldmlab.nn.compiling import region
from ldmlab.nn.positions import Rotation, number_embedding, rotary, rotate, sine_cosine

Context = Literal["cross", "in_context", "both"]
Norm = Callable[[int], nn.Module]


class DiTCache(NamedTuple):
    """What does not change between the steps of one sample."""

    kv: Sequence[KeysValues | Tensor | None]  # of the tokens, for each block; None: no cross-attention
    context: Tensor | None  # (B, L, D) tokens that join the sequence
    vector: Tensor | None  # (B, D)


class SelfAttention(nn.Module):
    """Attention among all tokens, with norms and rotary positions on queries and keys where the network has them."""

    def __init__(self, width: int, heads: int, norm: Norm | None) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: q | k | v, then head, then channel
        self.norm_q, self.norm_k = (norm(width // heads) if norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation | None) -> Tensor:
        """(B, N, D) => (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, d)
        q, k = self.norm_q(q), self.norm_k(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        return self.out(attend(q.to(v.dtype), k.to(v.dtype), v))


@region
class DiTBlock(nn.Module):
    """Self-attention, cross-attention to tokens where there are any, MLP; scales, shifts and gates from the condition.

    adaLN-Zero: x + gate f(norm(x) (1 + scale) + shift), every gate 0 at the start (DiT, section 3.2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        context_width: int | None,
        mlp: nn.Module,
        norm: Norm,
        mlp_norm: Norm,
        qk_norm: Norm | None,
        shift: bool,
    ) -> None:
        super().__init__()
        self.shift = shift
        self.norm_attention, self.norm_mlp = norm(width), mlp_norm(width)
        self.attention = SelfAttention(width, heads, qk_norm)
        self.mlp = mlp
        self.modulation = nn.Linear(width, (6 if shift else 4) * width)
        self.cross_attention = self.norm_cross = None
        if context_width is not None:
            self.norm_cross = norm(width)
            self.cross_attention = TokenAttention(width, heads, width // heads, context_width)

    def forward(
        self, x: Tensor, condition: Tensor, rotation: Rotation | None, kv: KeysValues | Tensor | None
    ) -> Tensor:
        """x (B, N, D), condition (B, D) after its SiLU, tokens or their keys and values => (B, N, D)."""
        parts = self.modulation(condition).chunk(6 if self.shift else 4, dim=1)
        if not self.shift:
            parts = (None, *parts[:2], None, *parts[2:])
        x = x + parts[2][:, None] * self.attention(modulate(self.norm_attention(x), parts[0], parts[1]), rotation)
        if self.cross_attention is not None and self.norm_cross is not None:
            x = x + self.cross_attention(self.norm_cross(x), kv)
        return x + parts[5][:, None] * self.mlp(modulate(self.norm_mlp(x), parts[3], parts[4]))


def _check(width: int, heads: int, rotary_positions: bool, context: str) -> None:
    """InputError where heads or positional embeddings do not fit the width, or `context` is unknown."""
    one_of("backbone.context", context, ("cross", "in_context", "both"))
    if width % heads or width % 4 or (rotary_positions and width // heads % 4):
        raise InputError(
            f"backbone.width={width} with heads={heads}: heads and 4 must divide the width, and with rotary "
            "positions 4 must divide the width of a head; choose for instance width=384, heads=6."
        )


def _norms(rms_norm: bool, qk_norm: bool, mlp_norm_eps: float) -> tuple[Norm, Norm, Norm | None]:
    """Before attention and the output, before MLPs, and on queries and keys."""
    if rms_norm:
        return gained_norm, gained_norm, gained_norm if qk_norm else None
    return plain_norm, partial(plain_norm, eps=mlp_norm_eps), LayerNorm if qk_norm else None


class DiT(nn.Module):
    """prediction(x, t, conditioning) of the official DiT, SiT and LightningDiT; any size of x that p divides.

    Official parameter counts at p = 2, C = 4, 1,000 classes: S 33M, B 130M, L 458M, XL 675M. The class is a vector
    conditioner of width D (`slot: vector`). Time is embedded as it comes: 0 .. steps - 1 for DiT, 0 .. 1 for SiT.
    """

    idle_without = "route_share: route"

    def __init__(
        self,
        in_channels: int,  # latent plus spatial conditioning; derived in wiring
        out_channels: int,  # of the latent; derived in wiring
        width: int,  # D
        depth: int,  # blocks
        heads: int,  # of attention
        patch_size: int = 2,  # p
        mlp_ratio: float = 4.0,  # width of the MLPs in multiples of D
        context_width: int | None = None,  # of the tokens; None: no tokens; derived in wiring
        vector_width: int | None = None,  # of vector conditioning; derived in wiring
        numbers: int = 0,  # embedded beside the time; derived in wiring
        project_vector: bool = False,  # a linear layer for it; False: D wide, added to the time embedding as it is
        context: Context = "cross",  # tokens by cross-attention, in the sequence (in_context), or both
        rms_norm: bool = False,  # RMSNorm with learned gains in place of LayerNorm without
        swiglu: bool = False,  # gated MLPs
        rotary_positions: bool = False,  # rotary positions, beside the sines and cosines added to the patches
        qk_norm: bool = False,  # norms on queries and keys
        shift: bool = True,  # blocks shift as well as scale
        mlp_norm_eps: float = EPSILON,  # of the LayerNorm before the MLPs; diffusers' converted weights: 1e-5
        frequency_shift: int = 0,  # of the time embedding's frequencies; diffusers' DiTTransformer2DModel: 1
        unused_half: bool = False,  # twice the output channels, the second half dropped (SiT's learn_sigma)
        route: tuple[int, int] | None = None,  # first and last block, from 1, that patches skip in training; None: none
        route_share: float = 0.5,  # of the patches that skip them
        gradient_checkpointing: bool = False,  # recompute blocks in the backward pass: less memory, a third more time
    ) -> None:
        super().__init__()
        check_sizes(1, width=width, depth=depth, heads=heads, patch_size=patch_size)
        _check(width, heads, rotary_positions, context)
        self.in_channels, self.out_channels, self.size_step = in_channels, out_channels, patch_size
        self.context_width, self.vector_width, self.context = context_width, vector_width, context
        self.width, self.head_width, self.frequency_shift = width, width // heads, frequency_shift
        self.rotary_positions, self.gradient_checkpointing = rotary_positions, gradient_checkpointing
        self.route = None if route is None else TokenRoute(*route, route_share).checked(depth)
        norms, mlp = _norms(rms_norm, qk_norm, mlp_norm_eps), partial(SwiGLU if swiglu else MLP, width, mlp_ratio)
        crossing = context_width if context != "in_context" else None
        self._make_inputs(project_vector, numbers)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, crossing, mlp(), *norms, shift) for _ in range(depth))
        self._make_output(norms[0], (1 + unused_half) * out_channels)
        self._initialise()

    def _make_inputs(self, project_vector: bool, numbers: int) -> None:
        """Layers for patches, time, numbers, vector and the tokens that join the sequence."""
        width, joining = self.width, self.context_width if self.context != "cross" else None
        self.patches = nn.Conv2d(self.in_channels, width, self.size_step, self.size_step)
        self.time_expand, self.time_mix = nn.Linear(TIME_CHANNELS, width), nn.Linear(width, width)
        self.numbers = number_embedding(numbers, width)
        self.vector = vector_projection(self.vector_width, width, project_vector)
        self.joining = nn.Linear(joining, width) if joining else None
        self._positions: dict[tuple[int, int, torch.device], tuple[Tensor, Rotation | None]] = {}

    def _make_output(self, norm: Norm, channels: int) -> None:
        """The final layer: norm, modulation, and the linear layer to patches of `channels`."""
        self.norm_out = norm(self.width)
        self.modulation_out = nn.Linear(self.width, 2 * self.width)
        self.out = nn.Linear(self.width, channels * self.size_step**2)

    def _initialise(self) -> None:
        """Glorot's uniform for linear layers and patches, N(0, 0.02) for the time; modulations and outputs are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in (self.time_expand, self.time_mix):
            nn.init.normal_(layer.weight, std=0.02)
        for block in cast(Iterable[DiTBlock], self.blocks):
            zero(block.modulation)
            if block.cross_attention is not None:
                zero(block.cross_attention.out)
        zero(self.modulation_out)
        zero(self.out)
        if self.numbers is not None:
            zero(self.numbers.mix)

    @property
    def accepts(self) -> frozenset[str]:
        """Slots of the conditioning this network was built for."""
        slots = {"tokens": self.context_width, "vector": self.vector_width, "spatial": self.in_channels}
        return frozenset(slot for slot, width in {**slots, "numbers": self.numbers}.items() if width)

    def aligned(self, block: int | None) -> tuple[nn.Module, int]:
        """See `contracts.Backbone`; the 8th block of 28, the 4th of 12."""
        number = chosen_block(len(self.blocks), block)
        if self.route is not None:
            self.route.check_whole(number)
        return self.blocks[number - 1], self.width

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """Keys and values of the tokens for every block, tokens that join the sequence, and the projected vector."""
        tokens, cache = self._projected(conditioning)
        cross = [cast(TokenAttention | None, block.cross_attention) for block in self.blocks]
        kv = [None if part is None or tokens is None else part.keys_values(tokens) for part in cross]
        return Prepared(conditioning, cache._replace(kv=kv))

    def _projected(self, conditioning: Conditioning) -> tuple[Tensor | None, DiTCache]:
        """Tokens (B, L, D'), and the cache with them in place of keys and values: each block makes its own."""
        check_slots("the DiT", self.accepts, conditioning)
        dtype = self.patches.weight.dtype
        tokens, vector = (None if v is None else v.to(dtype) for v in (conditioning.tokens, conditioning.vector))
        context = None if tokens is None or self.joining is None else self.joining(tokens)
        projected = None if vector is None or self.vector is None else self.vector(vector)
        crossed = None if self.context == "in_context" else tokens
        return tokens, DiTCache([crossed] * len(self.blocks), context, projected)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """x (B, C, h, w), t (B,) => (B, out_channels, h, w); weights may be half precision."""
        if isinstance(conditioning, Prepared):
            given, cache = conditioning.conditioning, conditioning.cache
        else:
            given, cache = conditioning, self._projected(conditioning)[1]
        times = timestep_embedding(t, TIME_CHANNELS, shift=self.frequency_shift, like=self.patches.weight)
        condition = self.time_mix(F.silu(self.time_expand(times)))
        if self.numbers is not None:
            condition = condition + self.numbers(given.numbers)
        condition = F.silu(condition if cache.vector is None else condition + cache.vector)
        return self.conditioned(x, [condition] * (len(self.blocks) + 1), given.spatial, cache)

    def conditioned(self, x: Tensor, conditions: Sequence[Tensor], spatial: Tensor | None, cache: DiTCache) -> Tensor:
        """`forward`, given the condition (B, D) after its SiLU of each block and, last, of the output."""
        if spatial is not None:
            x = torch.cat([x, spatial.to(x.dtype)], dim=1)
        dtype = self.patches.weight.dtype
        maps = self.patches(x.to(dtype))  # (B, D, h / p, w / p)
        rows, columns = maps.shape[2:]
        positions, rotation = self._places(rows, columns, x.device)
        h = maps.flatten(2).transpose(1, 2) + positions.to(dtype)  # (B, N, D)
        joined = 0
        if cache.context is not None:
            joined = cache.context.shape[1]
            h = torch.cat([cache.context.to(h.dtype), h], dim=1)
            if rotation is not None:  # tokens are not turned
                rotation = (F.pad(rotation[0], (0, 0, joined, 0), value=1), F.pad(rotation[1], (0, 0, joined, 0)))
        route = self.route if self.training else None
        whole, turns, kept = h, rotation, torch.empty(0)
        for number, (block, condition, kv) in enumerate(zip(self.blocks, conditions[:-1], cache.kv, strict=True), 1):
            if route is not None and number == route.first:
                whole, kept = h, route.kept(h, joined)
                h, turns = taken(h, rotation, kept)
            h = run(self.gradient_checkpointing, block, h, condition, turns, kv)
            if route is not None and number == route.last:
                h, turns = returned(whole, h, kept), rotation
        shift, scale = self.modulation_out(conditions[-1]).chunk(2, dim=1)
        out = self.out(modulate(self.norm_out(h[:, joined:]), shift, scale))  # (B, N, p p C)
        return unpatched(out, self.size_step, rows, columns)[:, : self.out_channels]

    def _places(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Rotation | None]:
        """Positions added to the patches, (N, D), and rotations of queries and keys; computed once a size."""
        key = (rows, columns, device)
        if key not in self._positions:
            added = sine_cosine(rows, columns, self.width, device)
            rotation = rotary(rows, columns, self.head_width, device) if self.rotary_positions else None
            self._positions[key] = added, rotation
        return self._positions[key]
