"""A feature extractor that needs no weights, and a metric on what it gives."""

import torch
from torch import Tensor, nn
from torchmetrics import Metric


class MeanColours(nn.Module):
    """The mean colour of each quarter of an image: 12 numbers in [0, 1]."""

    name = "mean-colours"
    weights_hash = "none"
    width = 12
    gives = frozenset({"features"})
    preparation = "8-bit RGB / 255, means over 2 x 2 areas"

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) => features (B, 12)."""
        return {"features": nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}


class ColourAgreement(Metric):
    """1 where generated and real images have the same mean features, 0 far away."""

    higher_is_better = True
    title = "Colour agreement"
    meaning = "exp(- distance of the mean features of real and generated images)"
    full_state_update = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, width, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, real: bool) -> None:
        """Features (B, D)."""
        self.sums[int(real)] += features.double().sum(0)
        self.counts[int(real)] += len(features)

    def compute(self) -> dict[str, Tensor]:
        """`colour_agreement`, in [0, 1]."""
        generated, real = self.sums / self.counts[:, None]
        return {"colour_agreement": torch.exp(-(generated - real).norm()).float()}
