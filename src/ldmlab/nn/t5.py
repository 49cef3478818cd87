"""The encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683; Shazeer 2020 for its gated MLPs).

Shapes: B batch, L tokens, D width, H heads, d width of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.nn.blocks import RMSNorm


class T5Block(nn.Module):
    """x + out(attention(norm(x))), then x + shrink(gelu(gate(norm(x))) expand(norm(x))); no biases."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = RMSNorm(width, eps=eps), RMSNorm(width, eps=eps)
        self.q, self.k, self.v = (nn.Linear(width, heads * head_width, bias=False) for _ in range(3))
        self.out = nn.Linear(heads * head_width, width, bias=False)
        self.gate, self.expand = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.shrink = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x (B, L, D), bias (1, H, L, L) of the scores, which are not scaled => (B, L, D)."""
        h = self.norm_attention(x)
        q, k, v = (layer(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=1.0)  # (B, H, L, d)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.norm_mlp(x)
        return x + self.shrink(F.gelu(self.gate(h), approximate="tanh") * self.expand(h))


class T5Encoder(nn.Module):
    """Token numbers to states; positions act through a bias of the scores, the same in every block."""

    def __init__(
        self,
        vocab_size: int = 32128,
        width: int = 4096,  # D
        depth: int = 24,  # blocks
        heads: int = 64,  # H
        head_width: int = 64,  # d
        hidden: int = 10240,  # of the MLPs
        buckets: int = 32,  # of distances, half of them for tokens that follow
        longest: int = 128,  # distance from which all are one bucket
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.width, self.buckets, self.longest = width, buckets, longest
        self.tokens, self.bias = nn.Embedding(vocab_size, width), nn.Embedding(buckets, heads)
        self.blocks = nn.ModuleList(T5Block(width, heads, head_width, hidden, eps) for _ in range(depth))
        self.norm = RMSNorm(width, eps=eps)

    def forward(self, ids: Tensor) -> Tensor:
        """(B, L) => (B, L, D); padding is attended to, as SD3's pipelines do."""
        x = self.tokens(ids)
        bias = self.bias(self.distance_buckets(ids.shape[1], ids.device)).permute(2, 0, 1)[None]  # (1, H, L, L)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)

    def distance_buckets(self, length: int, device: torch.device | None = None) -> Tensor:
        """(L, L): of key j seen from query i; exact for short distances, logarithmic up to `longest`."""
        places = torch.arange(length, device=device)
        ahead = places[None] - places[:, None]
        half = self.buckets // 2
        exact, distance = half // 2, ahead.abs()
        ratio = torch.log(distance.clamp_min(1).float() / exact) / math.log(self.longest / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp_max(half - 1)
        return half * (ahead > 0) + torch.where(distance < exact, distance, far)
