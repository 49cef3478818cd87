"""Reconstruction error: absolute error, and LPIPS where it has a weight."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ldmlab.errors import InputError, one_of

Reduction = Literal["sum_per_image", "mean"]
Spread = Literal["fixed", "learned"]  # exp(logvar)


class ReconstructionLoss(nn.Module):
    """|x - y| + lpips_weight LPIPS(x, y), divided by exp(logvar) and with logvar added, at every value of an image.

    `sum_per_image` adds over the 3 H W values of an image and averages over images (the official KL models);
    `mean` averages over everything (the official VQ models). LPIPS is one number an image, given to each value.
    """

    def __init__(
        self,
        *,
        lpips_weight: float,
        reduction: Reduction,
        logvar: Spread = "fixed",
        lpips: nn.Module | None = None,  # needed only where its weight is not 0
    ) -> None:
        super().__init__()
        if lpips_weight and lpips is None:
            raise InputError(
                f"loss.lpips_weight={lpips_weight} needs the LPIPS network; "
                "run `ldmlab fetch lpips`, or set loss.lpips_weight=0."
            )
        one_of("loss.reduction", reduction, get_args(Reduction))
        one_of("loss.logvar", logvar, get_args(Spread))
        self.lpips_weight = lpips_weight
        self.reduction = reduction
        self.lpips = lpips if lpips_weight else None
        if logvar == "learned":
            self.logvar: Tensor = nn.Parameter(torch.zeros(()))
        else:
            self.register_buffer("logvar", torch.zeros(()))
        self._fixed: tuple[Tensor, int, Tensor] | None = None  # logvar, its version, exp(-logvar)

    def forward(self, images: Tensor, reconstructed: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Two batches (B, 3, H, W) in [-1, 1] => loss, and the plain means of its terms (`l1`, `lpips`)."""
        terms = {"l1": (images.float() - reconstructed.float()).abs().mean()}
        error = terms["l1"]
        if self.lpips is not None:
            terms["lpips"] = self.lpips(images, reconstructed).mean()
            error = error + self.lpips_weight * terms["lpips"]
        loss = torch.addcmul(self.logvar, error, self._scale())  # mean over values
        if self.reduction == "sum_per_image":
            loss = loss * math.prod(images.shape[1:])
        return loss, terms

    def _scale(self) -> Tensor:
        """exp(-logvar), of a fixed logvar computed again only where it was replaced or written to."""
        if isinstance(self.logvar, nn.Parameter):
            return torch.exp(-self.logvar)
        if self._fixed is None or self._fixed[0] is not self.logvar or self._fixed[1] != self.logvar._version:
            self._fixed = self.logvar, self.logvar._version, torch.exp(-self.logvar)
        return self._fixed[2]
