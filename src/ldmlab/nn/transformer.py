"""The transformer encoder that the paper trains jointly with the denoiser (appendix E.2.1), for captions and for boxes.

Shapes: B batch, L tokens, D width. Nothing is masked: every token looks at every other, padding too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.nn.attention import TokenAttention

_HEAD_CHANNELS = 64


class EncoderBlock(nn.Module):
    """Self-attention, then an MLP with exact GELU, each behind a layer norm and with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = TokenAttention(width, heads, _HEAD_CHANNELS)
        self.norm_mlp = nn.LayerNorm(width)
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
        self.norm = nn.LayerNorm(width)
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
