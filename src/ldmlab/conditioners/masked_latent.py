"""The latent of an image with holes, concatenated to the noisy latent: inpainting (section 4.5)."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.conditioners.rates import checked_rate
from ldmlab.contracts import Encode, LatentSpec
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float


class MaskedLatent(nn.Module):
    """encode(image where kept, `hole` elsewhere), (B, C, h, w)."""

    reads = frozenset({"image", "mask"})
    slot = "spatial"

    def __init__(
        self,
        hole: float = -1.0,  # pixels in holes: -1 black as in the official LDM, 0 grey as in Stable Diffusion
        drop: float = 0.0,  # rate of "all is a hole" in training, for guidance
    ) -> None:
        super().__init__()
        if not -1 <= hole <= 1:
            raise InputError(f"conditioner.hole={hole} is no pixel; choose -1 (black) to 1 (white).")
        self.drop = checked_rate(drop)
        self.hole = hole

    def width(self, latent: LatentSpec) -> int:
        """The latent's channels."""
        return latent.channels

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """`image` uint8 (B, 3, H, W), `mask` uint8 (B, 1, H, W), 1 where the hole is."""
        pixels = to_float(batch["image"])
        return encode(pixels.masked_fill(batch["mask"].bool(), self.hole))

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The latent of an image that is all hole."""
        return encode(torch.full_like(batch["image"], self.hole, dtype=torch.float32))
