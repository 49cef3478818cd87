"""The multimodal diffusion transformer of Stable Diffusion 3 (MMDiT: Esser et al. 2024, arXiv 2403.03206, section 4).

Shapes: B batch, C latent channels, h w latent size, p side of a patch, N = (h / p) (w / p) patches, L tokens, D width.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.backbones.tokens import TIME_CHANNELS, chosen_block, gained_norm, modulate, plain_norm, unpatched
from ldmlab.backbones.unet import check_sizes, check_slots, run
from ldmlab.contracts import Conditioning, Prepared
from ldmlab.errors import InputError
from ldmlab.nn.attention import attend
from ldmlab.nn.blocks import MLP, timestep_embedding, zero
from ldmlab.nn.compiling import region
from ldmlab.nn.positions import number_embedding, sine_cosine

Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys, values, each (B, H, N, d)


class MMDiTCache(NamedTuple):
    """What does not change between the steps of one sample."""

    context: Tensor  # (B, L, D)
    vector: Tensor | None  # (B, D)


class HeadsOf(nn.Module):
    """Queries, keys and values of one sort of tokens, and the layer after attention."""

    def __init__(self, width: int, heads: int, qk_norm: bool, out: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: q | k | v, then head, then channel
        self.norm_q, self.norm_k = (gained_norm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.out = nn.Linear(width, width) if out else None

    def forward(self, x: Tensor) -> Heads:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype), v


class Stream(nn.Module):
    """The layers of one sort of tokens in a block: scales, shifts and gates, attention's layers, MLP.

    `last`: tokens that only give keys and values, and end there.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.norm = plain_norm(width)
        self.modulation = nn.Linear(width, (2 if last else 9 if dual else 6) * width)
        self.attention = HeadsOf(width, heads, qk_norm, out=not last)
        self.dual = HeadsOf(width, heads, qk_norm) if dual else None  # attention among these tokens alone
        self.mlp = None if last else MLP(width, mlp_ratio)

    def before(self, x: Tensor, condition: Tensor) -> tuple[Heads, tuple[Tensor, ...]]:
        """Heads of x (B, N, D), and the modulation: attention's shift, scale, gate, the MLP's, the second's."""
        parts = self.modulation(condition).chunk(self.modulation.out_features // x.shape[2], dim=1)
        if self.mlp is None:
            parts = parts[1], parts[0]  # stored as scale, shift
        return self.attention(modulate(self.norm(x), parts[0], parts[1])), parts

    def after(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """x with what attention gave for it, and through the MLP."""
        assert self.mlp is not None
        assert self.attention.out is not None
        y = x + parts[2][:, None] * self.attention.out(attended)
        if self.dual is not None and self.dual.out is not None:
            own = self.dual(modulate(self.norm(x), parts[6], parts[7]))
            y = y + parts[8][:, None] * self.dual.out(attend(*own))
        return y + parts[5][:, None] * self.mlp(modulate(self.norm(y), parts[3], parts[4]))


@region
class MMDiTBlock(nn.Module):
    """Attention among patches and tokens together; each sort has weights of its own (figure 2 b)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, dual: bool, last: bool) -> None:
        super().__init__()
        self.image = Stream(width, heads, mlp_ratio, qk_norm, dual=dual, last=False)
        self.text = Stream(width, heads, mlp_ratio, qk_norm, dual=False, last=last)

    def forward(self, x: Tensor, context: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, D), context (B, L, D), condition (B, D) after its SiLU => both; the last context is the old one."""
        (own, parts), (other, text_parts) = self.image.before(x, condition), self.text.before(context, condition)
        both = attend(*(torch.cat(pair, dim=2) for pair in zip(own, other, strict=True)))  # (B, N + L, D)
        attended, attended_text = both.split([x.shape[1], context.shape[1]], dim=1)
        if self.text.mlp is not None:
            context = self.text.after(context, attended_text, text_parts)
        return self.image.after(x, attended, parts), context


def _check(width: int, heads: int, depth: int, dual_attention: Sequence[int]) -> None:
    """InputError where heads or positions do not fit the width, or a block is named that there is not."""
    if width % heads or width % 4 or not all(0 <= block < depth for block in dual_attention):
        raise InputError(
            f"backbone.width={width}, heads={heads}, depth={depth}, dual_attention={list(dual_attention)}: heads "
            "and 4 must divide the width, and dual_attention names blocks from 0 to depth - 1."
        )


class MMDiT(nn.Module):
    """prediction(x, t, conditioning) of SD3's and SD3.5's transformers; any size of x that p divides.

    The text is conditioned on as tokens (states of its encoders) and, optionally, a vector (pooled states).
    """

    def __init__(
        self,
        in_channels: int,  # latent plus spatial conditioning; derived in wiring
        out_channels: int,  # of the latent; derived in wiring
        width: int,  # D
        depth: int,  # blocks
        heads: int,  # of attention
        patch_size: int = 2,  # p
        mlp_ratio: float = 4.0,  # width of the MLPs in multiples of D
        context_width: int | None = None,  # of the tokens; derived in wiring
        vector_width: int | None = None,  # of vector conditioning; derived in wiring
        pooled_width: int | None = None,  # of a vector in the first tokens (Sd3Text), instead of vector_width
        qk_norm: bool = True,  # RMSNorm on queries and keys, as in SD3.5; False: as in SD3
        dual_attention: Sequence[int] = (),  # blocks, from 0, in which patches attend a second time, to themselves
        position_grid: int = 192,  # side of the grid of positional embeddings; x takes its centre
        position_base: int = 64,  # positions in the grid are 0 .. base, base / grid apart
        numbers: int = 0,  # embedded beside the time; derived in wiring
        gradient_checkpointing: bool = False,  # recompute blocks in the backward pass: less memory, a third more time
    ) -> None:
        super().__init__()
        check_sizes(1, width=width, depth=depth, heads=heads, patch_size=patch_size)
        check_sizes(1, position_grid=position_grid, position_base=position_base)
        _check(width, heads, depth, dual_attention)
        if pooled_width and vector_width:
            raise InputError(f"backbone.pooled_width={pooled_width}: a vector conditioner fills that; leave one out.")
        if context_width is None:
            raise InputError("backbone MMDiT needs tokens; add a conditioner with slot tokens, or choose a DiT.")
        self.in_channels, self.out_channels, self.size_step = in_channels, out_channels, patch_size
        self.width, self.context_width, self.vector_width = width, context_width, vector_width
        self.position_grid, self.position_base, self.pooled_width = position_grid, position_base, pooled_width
        self.gradient_checkpointing = gradient_checkpointing
        self._make_inputs(numbers)
        self.blocks = nn.ModuleList(
            MMDiTBlock(width, heads, mlp_ratio, qk_norm, i in set(dual_attention), i == depth - 1) for i in range(depth)
        )
        self.norm_out, self.modulation_out = plain_norm(width), nn.Linear(width, 2 * width)  # scale, shift
        self.out = nn.Linear(width, out_channels * patch_size**2)
        self._initialise()
        self._positions: dict[tuple[int, int, torch.device], Tensor] = {}

    def _make_inputs(self, numbers: int) -> None:
        """Layers for patches, time, numbers, vector and tokens."""
        width, vector_width = self.width, self.pooled_width or self.vector_width
        self.patches = nn.Conv2d(self.in_channels, width, self.size_step, self.size_step)
        self.time_expand, self.time_mix = nn.Linear(TIME_CHANNELS, width), nn.Linear(width, width)
        self.numbers = number_embedding(numbers, width)
        self.vector_expand = nn.Linear(vector_width, width) if vector_width else None
        self.vector_mix = nn.Linear(width, width) if vector_width else None
        self.context = nn.Linear(self.context_width, width)

    def _initialise(self) -> None:
        """As DiT: Glorot's uniform, N(0, 0.02) for time and vector; modulations and outputs are zero."""
        embedding = {self.time_expand, self.time_mix, self.vector_expand, self.vector_mix}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                if module in embedding:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(cast(Tensor, module.bias))
        for block in cast(Iterable[MMDiTBlock], self.blocks):
            zero(block.image.modulation)
            zero(block.text.modulation)
        if self.numbers is not None:
            zero(self.numbers.mix)
        zero(self.modulation_out)
        zero(self.out)

    @property
    def accepts(self) -> frozenset[str]:
        """Slots of the conditioning this network was built for."""
        slots = {"tokens": True, "spatial": True, "vector": self.vector_width, "numbers": self.numbers}
        return frozenset(slot for slot, there in slots.items() if there)

    def aligned(self, block: int | None) -> tuple[nn.Module, int]:
        """See `contracts.Backbone`; of the patches' stream."""
        return self.blocks[chosen_block(len(self.blocks), block) - 1], self.width

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """The tokens at the network's width, and the projected vector."""
        check_slots("the MMDiT", self.accepts, conditioning)
        dtype = self.patches.weight.dtype
        tokens, vector = cast(Tensor, conditioning.tokens).to(dtype), conditioning.vector
        if self.pooled_width:
            rows = -(-self.pooled_width // tokens.shape[2])
            vector, tokens = tokens[:, :rows].flatten(1)[:, : self.pooled_width], tokens[:, rows:]
        if self.vector_expand is not None and self.vector_mix is not None and vector is not None:
            vector = self.vector_mix(F.silu(self.vector_expand(vector.to(dtype))))
        return Prepared(conditioning, MMDiTCache(self.context(tokens), vector))

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        """x (B, C, h, w), t (B,) => (B, out_channels, h, w); weights may be half precision."""
        prepared = conditioning if isinstance(conditioning, Prepared) else self.prepare(conditioning)
        given, (context, vector) = prepared.conditioning, prepared.cache
        spatial = given.spatial
        if spatial is not None:
            x = torch.cat([x, spatial.to(x.dtype)], dim=1)
        dtype = self.patches.weight.dtype
        maps = self.patches(x.to(dtype))  # (B, D, h / p, w / p)
        rows, columns = maps.shape[2:]
        h = maps.flatten(2).transpose(1, 2) + self._places(rows, columns, x.device).to(dtype)  # (B, N, D)
        times = timestep_embedding(t, TIME_CHANNELS, like=self.patches.weight)
        condition = self.time_mix(F.silu(self.time_expand(times)))
        if self.numbers is not None:
            condition = condition + self.numbers(given.numbers)
        condition = F.silu(condition if vector is None else condition + vector)
        for block in self.blocks:
            h, context = run(self.gradient_checkpointing, block, h, context, condition)
        scale, shift = self.modulation_out(condition).chunk(2, dim=1)
        return unpatched(self.out(modulate(self.norm_out(h), shift, scale)), self.size_step, rows, columns)

    def _places(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(N, D) positions of the centre of the grid; larger sizes go beyond its borders. Computed once a size."""
        key = (rows, columns, device)
        if key not in self._positions:
            origin = ((self.position_grid - rows) // 2, (self.position_grid - columns) // 2)
            scale = self.position_base / self.position_grid
            self._positions[key] = sine_cosine(rows, columns, self.width, device, origin=origin, scale=scale)
        return self._positions[key]
