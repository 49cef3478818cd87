"""A low-resolution picture, as it is, concatenated to a latent of its own size: super-resolution (section 4.4)."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.conditioners.rates import checked_rate
from ldmlab.contracts import Encode, LatentSpec
from ldmlab.nn.pixels import to_float


class LowResolution(nn.Module):
    """The pixels of `low_resolution` in [-1, 1], (B, 3, h, w)."""

    reads = frozenset({"low_resolution"})
    slot = "spatial"

    def __init__(
        self,
        drop: float = 0.0,  # rate of grey pictures in training, for guidance
    ) -> None:
        super().__init__()
        self.drop = checked_rate(drop)

    def width(self, latent: LatentSpec) -> int:
        """Red, green and blue."""
        return 3

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """uint8 (B, 3, h, w) at the latent's height and width => the same in [-1, 1]."""
        return to_float(batch["low_resolution"])

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """Grey: zeros."""
        return torch.zeros_like(self(batch, encode))
