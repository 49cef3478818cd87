"""Attention over the pixels of a feature map and over conditioning tokens; transformers.

Shapes: B batch, C channels, h w feature map, N = h w, L conditioning tokens, H heads, d = width of a head.
A channels-last feature map is a sequence of tokens without a copy; every product here is a linear layer on tokens.
"""

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.nn.blocks import LayerNorm, group_norm, zero
from ldmlab.nn.compiling import region

KeysValues = tuple[Tensor, Tensor]  # each (B, H, L, d)
CrossKV = KeysValues | Tensor  # a single token needs no attention: (B, 1, C), the term it adds to every pixel
_PRODUCTS_UP_TO = {"cpu": 2**19, "cuda": 2**20}  # scores per head that are formed at once
_FUSED_HEAD = 256  # widest head that a GPU's flash kernel takes


def to_tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) => (B, N, C), a view if x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) => (B, C, h, w) with the size of `like`, a view laid out channels-last."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H d) => (B, H, N, d), a view."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def by_products(device: str, dtype: torch.dtype, queries: int, keys: int, width: int) -> bool:
    """Whether attention in half precision is two matrix products, as long as its scores (B, H, N, L) stay small.

    On a CPU they were measured two to five times faster; on a GPU fast fused kernels end at heads of 256 channels.
    """
    small = queries * keys <= _PRODUCTS_UP_TO.get(device, 0)
    return dtype in (torch.float16, torch.bfloat16) and small and (device == "cpu" or width > _FUSED_HEAD)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: (B, H, N, d) => (B, N, H d), fused or by plain products."""
    if by_products(q.device.type, q.dtype, q.shape[2], k.shape[2], q.shape[3]):
        with torch.autocast(q.device.type, enabled=False):  # softmax sums in float32 and gives back the scores' dtype
            scores = torch.matmul(q * q.shape[3] ** -0.5, k.transpose(2, 3))
            return torch.matmul(scores.softmax(dim=3), v).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@region
class PixelAttention(nn.Module):
    """Self-attention of a U-Net without tokens: x + out(attention(norm(x))), one fused q, k, v product."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)  # rows: head, then q | k | v, then d
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) => (B, C, h, w)."""
        tokens = to_tokens(self.norm(x))  # (B, N, C)
        qkv = self.qkv(tokens).unflatten(2, (self.heads, 3, -1))  # (B, N, H, 3, d)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(3))  # (B, H, N, d)
        return x + to_map(self.out(attend(q, k, v)), x)


class TokenAttention(nn.Module):
    """Attention from tokens to themselves or, with `context_width`, to prepared keys and values of a context."""

    def __init__(self, width: int, heads: int, head_channels: int, context_width: int | None = None) -> None:
        super().__init__()
        inner = heads * head_channels
        self.heads = heads
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(context_width or width, inner, bias=False)
        self.v = nn.Linear(context_width or width, inner, bias=False)
        self.out = nn.Linear(inner, width)

    def keys_values(self, context: Tensor) -> KeysValues:
        """(B, L, D) => keys and values of the heads."""
        return split_heads(self.k(context), self.heads), split_heads(self.v(context), self.heads)

    def forward(self, x: Tensor, context: KeysValues | Tensor | None = None) -> Tensor:
        """(B, N, width), tokens (B, L, D) or their keys and values => (B, N, width); None: x's own tokens."""
        k, v = context if isinstance(context, tuple) else self.keys_values(x if context is None else context)
        return self.out(attend(split_heads(self.q(x), self.heads), k, v))


class GatedMLP(nn.Module):
    """(..., width) => out(a gelu(b)), where a and b are the halves of expand(x), each four times as wide as x.

    GEGLU of Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, 8 * width)
        self.out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, gated MLP, each behind a layer norm and with a residual."""

    def __init__(self, width: int, heads: int, head_channels: int, context_width: int) -> None:
        super().__init__()
        self.norm_self = LayerNorm(width)
        self.self_attention = TokenAttention(width, heads, head_channels)
        self.norm_cross = LayerNorm(width)
        self.cross_attention = TokenAttention(width, heads, head_channels, context_width)
        self.norm_mlp = LayerNorm(width)
        self.mlp = GatedMLP(width)

    def precompute_kv(self, context: Tensor) -> CrossKV:
        """Tokens (B, L, D) => their keys and values; of a single one (softmax 1) the output of cross-attention."""
        cross = self.cross_attention
        if context.shape[1] > 1:
            return cross.keys_values(context)
        output = cross.out(cross.v(context))  # (B, 1, C)
        if torch.is_grad_enabled():  # the other weights have no influence: a gradient of zero, as attention would give
            idle = [cross.q.weight, cross.k.weight, *self.norm_cross.parameters()]
            output = output + 0 * torch.stack([p.sum() for p in idle]).sum().to(output.dtype)
        return output

    def forward(self, x: Tensor, kv: CrossKV) -> Tensor:
        """(B, N, width), with what `precompute_kv` gave => (B, N, width)."""
        x = x + self.self_attention(self.norm_self(x))
        x = x + (kv if isinstance(kv, Tensor) else self.cross_attention(self.norm_cross(x), kv))
        return x + self.mlp(self.norm_mlp(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, with cross-attention: x + out(blocks(in(norm(x)))).

    The official code projects in and out with 1 x 1 convolutions or linear layers; they are the same function.
    """

    def __init__(self, channels: int, heads: int, head_channels: int, depth: int, context_width: int) -> None:
        super().__init__()
        width = heads * head_channels
        self.norm = group_norm(channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, head_channels, context_width) for _ in range(depth))
        self.proj_out = zero(nn.Linear(width, channels))

    def precompute_kv(self, context: Tensor) -> list[CrossKV]:
        """Tokens (B, L, D) => keys and values of every block."""
        return [block.precompute_kv(context) for block in cast(Iterable[TransformerBlock], self.blocks)]

    def forward(self, x: Tensor, kv: list[CrossKV] | Tensor) -> Tensor:
        """(B, C, h, w), with tokens (B, L, D) or what `precompute_kv` gave for them => (B, C, h, w)."""
        kv = self.precompute_kv(kv) if isinstance(kv, Tensor) else kv
        tokens = self.proj_in(to_tokens(self.norm(x)))  # (B, N, width)
        for block, part in zip(self.blocks, kv, strict=True):
            tokens = block(tokens, part)
        return x + to_map(self.proj_out(tokens), x)


# ---- the encoder that the paper trains jointly with the denoiser (appendix E.2.1); no mask, padding is attended to

_HEAD_CHANNELS = 64


@region
class EncoderBlock(nn.Module):
    """Self-attention, then an MLP with exact GELU, each behind a layer norm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = LayerNorm(width)
        self.attention = TokenAttention(width, heads, _HEAD_CHANNELS)
        self.norm_mlp = LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.shrink = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x))
        return x + self.shrink(F.gelu(self.expand(self.norm_mlp(x))))


class TransformerEncoder(nn.Module):
    """Token numbers to states: embedding plus learned positions, blocks, final norm."""

    def __init__(
        self,
        vocabulary: int,  # number of tokens
        length: int,  # most tokens at once
        width: int,  # D
        depth: int,  # blocks
        heads: int = 8,  # of 64 channels each, whatever D
        unused_head: bool = False,  # official files have an output layer to the vocabulary that nothing ever runs
    ) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.unused_head = nn.Linear(width, vocabulary).requires_grad_(False) if unused_head else None

    @property
    def length(self) -> int:
        """Most tokens at once."""
        return self.positions.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Token numbers (B, L) => states (B, L, D)."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(places)  # (B, L, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
