"""Image networks of timm as feature extractors, DINOv2 first of all (FD-DINOv2: Stein et al., NeurIPS 2023)."""

from pathlib import Path

import torch
from torch import Tensor

from ldmlab.metrics.features import check_images
from ldmlab.nn import numerics
from ldmlab.nn.timm_network import TimmNetwork


class TimmFeatures(TimmNetwork):
    """A timm network without its classifier: the pooled features (for DINOv2 the class token after the last norm)."""

    gives = frozenset({"features"})

    def __init__(
        self,
        model: str,  # timm's name
        weights: Path | str,  # file of its weights: .safetensors, or .pth of tensors only
        image_size: int | None = None,  # px the images are resized to; None: the network's own
    ) -> None:
        super().__init__(model, weights, image_size, "features")
        self.weights_hash = str(self.file_hash)
        self.preparation = f"8-bit RGB, bicubic with antialiasing to {self.image_size} px, clamped"
        self.width = int(self.network.num_features)

    @numerics.exact()
    @torch.inference_mode()
    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """features (B, D); images are resized to the network's size, bicubic with antialiasing."""
        check_images(images)
        return {"features": self.network(self.pixels(images.to(self.get_buffer("mean").device).float() / 255))}
