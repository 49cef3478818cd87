"""Alignment of a first stage's latents with the patch features of a frozen encoder.

Yao et al., "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models" (VA-VAE),
CVPR 2025, arXiv 2501.01423, equations 3 to 7.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.contracts import PatchEncoder, Reconstruction
from ldmlab.errors import InputError
from ldmlab.losses.adversary import gradient_ratio

_WEIGHT_LIMIT = 1e8


class Encoded(NamedTuple):
    """What a batch's latents came from."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    last_layer: Tensor | None  # weight of the first stage's encoder's last convolution


def marginal_cosine(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """Mean over positions of relu(1 - margin - cos(z, f)), both (B, D, h, w)."""
    return F.relu(1 - margin - F.cosine_similarity(features, latents, dim=1)).mean()


def marginal_distances(latents: Tensor, features: Tensor, margin: float) -> Tensor:
    """Mean over pairs of positions of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin), of maps (B, D, h, w)."""
    units = [F.normalize(one.flatten(2), dim=1) for one in (latents, features)]  # (B, D, N)
    of_latents, of_features = (unit.transpose(1, 2) @ unit for unit in units)  # (B, N, N)
    return F.relu((of_latents - of_features).abs() - margin).mean()


class VisionAlignment(nn.Module):
    """cosine_weight x marginal cosine + distance_weight x marginal distances of projected latents and patch features.

    Its weight in the loss is `weight`, times |d reconstruction| / |d alignment| at the encoder's last convolution where
    it is adaptive. The frozen encoder is no submodule: nothing of it is trained, averaged or saved.
    """

    idle_without = "adaptive: weight, cosine_margin: cosine_weight, distance_margin: distance_weight"

    def __init__(
        self,
        *,
        encoder: PatchEncoder,
        latent_channels: int,  # of the first stage
        weight: float = 0.1,  # 0.5 without margins, to align fully; 0.1 with them, for reconstruction
        adaptive: bool = True,  # in addition, scale by the ratio of gradient norms at the encoder's last layer
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
        cosine_weight: float = 1.0,
        distance_weight: float = 1.0,
    ) -> None:
        super().__init__()
        if min(weight, cosine_weight, distance_weight) < 0:
            raise InputError(
                f"alignment: weight={weight}, cosine_weight={cosine_weight}, distance_weight={distance_weight} "
                "would push the latents away; choose 0 or more for each."
            )
        if not (0 <= cosine_margin < 2 and 0 <= distance_margin < 2 and cosine_weight + distance_weight > 0):
            raise InputError(
                f"alignment: cosine_margin={cosine_margin}, distance_margin={distance_margin}, "
                f"cosine_weight={cosine_weight}, distance_weight={distance_weight}; cosines differ by at most 2, so "
                "choose margins of 0 to below 2 and a weight above 0, or alignment=none."
            )
        self._frozen = (encoder,)  # in a tuple, so that it is no submodule
        self.loss_scale: Tensor | None = None  # of float16's small gradients; None: they are float32 or bfloat16
        self.projection = nn.Conv2d(latent_channels, encoder.width, 1, bias=False)
        self.weight, self.adaptive = weight, adaptive
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin
        self.cosine_weight, self.distance_weight = cosine_weight, distance_weight

    @property
    def encoder(self) -> PatchEncoder:
        """The frozen encoder."""
        return self._frozen[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VisionAlignment":
        """Moved together with the loss."""
        if recurse and isinstance(self.encoder, nn.Module):
            self.encoder._apply(fn)
        return super()._apply(fn, recurse)

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] and their raw latents (B, C, h, w) => scalar."""
        with torch.no_grad():
            features = self.encoder(images).float()  # (B, D, h', w')
        if features.shape[-2:] != latents.shape[-2:]:
            features = F.interpolate(features, size=latents.shape[-2:], mode="bilinear", align_corners=False)
        projected = self.projection(latents.to(self.projection.weight.dtype)).float()
        cosine = marginal_cosine(projected, features, self.cosine_margin)
        return self.cosine_weight * cosine + self.distance_weight * marginal_distances(
            projected, features, self.distance_margin
        )

    def weighted(self, error: Tensor, given: Reconstruction, encoded: Encoded) -> tuple[Tensor, Tensor]:
        """The alignment of a batch whose reconstruction error is `error`, and its factor in the loss."""
        if given.latents is None:
            raise InputError("alignment needs a first stage whose reconstruct() gives its latents; choose another.")
        if not given.latents.requires_grad:
            raise InputError("alignment trains the encoder, which stage.trained freezes; set alignment=none.")
        term = self(encoded.images, given.latents)
        if not self.adaptive:
            return term, term.new_tensor(self.weight)
        if encoded.last_layer is None:
            raise InputError("alignment.adaptive=true needs a first stage with encoder_last_layer; choose false.")
        return term, self.weight * gradient_ratio(error, term, encoded.last_layer, _WEIGHT_LIMIT, self.loss_scale)
