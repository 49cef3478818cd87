"""The length of a caption as a vector, with a learned one for no caption."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import Encode, LatentSpec
from ldmlab.errors import InputError


class CaptionLength(nn.Module):
    """One learned vector for each number of words."""

    reads = frozenset({"caption"})
    slot = "vector"

    def __init__(self, width: int = 32, longest: int = 16, drop: float = 0.1) -> None:
        super().__init__()
        if not 0 <= drop <= 1:
            raise InputError(f"conditioner.drop={drop} is no rate; choose a number in [0, 1].")
        self.drop, self.longest = drop, longest
        self.table = nn.Embedding(longest + 1, width)
        self.unknown = nn.Parameter(torch.zeros(width))

    def width(self, latent: LatentSpec) -> int:
        """Of the vector, whatever the latent."""
        return self.table.embedding_dim

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """(B, width)."""
        words = [min(len(caption.split()), self.longest) for caption in batch["caption"]]
        return self.table(torch.tensor(words, device=self.unknown.device))

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The learned vector for no caption, (B, width)."""
        return self.unknown.expand(len(batch["caption"]), -1)
