"""Inpainting: the mask, and the latent of the image with holes, concatenated to the noisy latent (section 4.5)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmlab.conditioners import BaseConditioner
from ldmlab.contracts import Encode, LatentSpec
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float


class Mask(BaseConditioner):
    """`mask` at the latent's size, nearest neighbour, (B, 1, h, w): one number for what is kept, one for holes."""

    reads = frozenset({"mask"})
    slot = "spatial"

    def __init__(
        self,
        downsampling: int,  # of the first stage; derived in wiring
        keep: float = -1.0,  # official LDM: -1, Stable Diffusion: 0
        hole: float = 1.0,
        drop: float = 0.0,  # rate of masks that are all hole in training, for guidance
    ) -> None:
        super().__init__(drop, width=1)
        if keep == hole:
            raise InputError(f"conditioner.keep={keep} equals conditioner.hole; choose two numbers, such as -1 and 1.")
        self.downsampling, self.keep, self.hole = downsampling, keep, hole

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """uint8 (B, 1, H, W), 1 where the hole is => float (B, 1, h, w)."""
        mask = batch["mask"].float()
        height, width = (side // self.downsampling for side in mask.shape[2:])
        return self.keep + (self.hole - self.keep) * F.interpolate(mask, (height, width), mode="nearest")

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        return torch.full_like(self(batch, encode), self.hole)


class MaskedLatent(BaseConditioner):
    """encode(image where kept, `hole` elsewhere), (B, C, h, w)."""

    reads = frozenset({"image", "mask"})
    slot = "spatial"

    def __init__(
        self,
        hole: float = -1.0,  # pixels in holes: -1 black as in the official LDM, 0 grey as in Stable Diffusion
        drop: float = 0.0,  # rate of masks that are all hole in training, for guidance
    ) -> None:
        super().__init__(drop)
        if not -1 <= hole <= 1:
            raise InputError(f"conditioner.hole={hole} is no pixel; choose -1 (black) to 1 (white).")
        self.hole = hole

    def width(self, latent: LatentSpec) -> int:
        return latent.channels

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """`image` uint8 (B, 3, H, W), `mask` uint8 (B, 1, H, W), 1 where the hole is."""
        pixels = to_float(batch["image"])
        return encode(pixels.masked_fill(batch["mask"].bool(), self.hole))

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        return encode(torch.full_like(batch["image"], self.hole, dtype=torch.float32))
