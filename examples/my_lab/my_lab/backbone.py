"""A small diffusion transformer (after Peebles and Xie, 2023): patches, attention, time and vector conditioning.

Shapes: B batch, C channels, h w latent height and width, N patches, D width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.contracts import Conditioning, Prepared


class TinyDiT(nn.Module):
    """Predicts the target of the chosen prediction for a noisy latent (B, C, h, w) at times t (B,)."""

    accepts = frozenset({"vector"})

    def __init__(
        self,
        in_channels: int,  # filled in by ldmlab, as are the next two
        out_channels: int,
        vector_width: int | None = None,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        patch: int = 2,  # px of the latent
    ) -> None:
        super().__init__()
        self.width, self.patch, self.size_step = width, patch, patch
        self.embed = nn.Conv2d(in_channels, width, patch, stride=patch)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.vector = nn.Linear(vector_width, width) if vector_width else None
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, out_channels * patch**2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def prepare(self, conditioning: Conditioning) -> Prepared:
        """The vector's projection, computed once per sample instead of once per step."""
        known = self.vector is not None and conditioning.vector is not None
        return Prepared(conditioning, self.vector(conditioning.vector) if known else 0.0)

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor:
        prepared = conditioning if isinstance(conditioning, Prepared) else self.prepare(conditioning)
        patches = self.embed(x)  # (B, D, h / p, w / p)
        rows, columns = patches.shape[-2:]
        tokens = patches.flatten(2).mT + positions(rows, columns, self.width, x.device)  # (B, N, D)
        state = self.time(waves(t, self.width)) + prepared.cache  # (B, D)
        for block in self.blocks:
            tokens = block(tokens, state)
        out = self.out(self.norm(tokens)).mT.unflatten(2, (rows, columns))  # (B, C p p, h / p, w / p)
        return F.pixel_shuffle(out, self.patch)


class Block(nn.Module):
    """Attention and two linear layers, scaled and shifted by the state."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.modulation = nn.Linear(width, 4 * width)
        self.qkv, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        scale_a, shift_a, scale_m, shift_m = self.modulation(F.silu(state))[:, None].chunk(4, dim=-1)
        q, k, v = self.qkv(self.norms[0](x) * (1 + scale_a) + shift_a).unflatten(-1, (3, self.heads, -1)).unbind(2)
        attended = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + self.join(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x) * (1 + scale_m) + shift_m)


def waves(position: Tensor, width: int) -> Tensor:
    """Sines and cosines of positions or times (n,) => (n, width), periods from 2 pi to 20,000 pi."""
    rates = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=position.device) / (width // 2))
    angles = position.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """Half of the width for the row, half for the column: (N, width), any size."""
    down, across = (waves(torch.arange(count, device=device), width // 2) for count in (rows, columns))
    return torch.cat([down.repeat_interleave(columns, 0), across.repeat(rows, 1)], dim=1)
