"""Convolutional discriminator with one output per overlapping patch.

Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", CVPR 2017, section 3.2.2.
"""

from collections.abc import Callable

from torch import Tensor, nn

from ldmlab.errors import InputError, one_of
from ldmlab.nn.blocks import GroupNorm
from ldmlab.nn.compiling import region

_MOST_LAYERS = 14  # 3 * 2^14 px is the largest side of images that files hold
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "group": lambda width: GroupNorm(min(32, width // 2), width),  # each image by itself: any split is the same
    "sync_batch": nn.SyncBatchNorm,  # as released; statistics over all processes
}


@region
class PatchDiscriminator(nn.Module):
    """Images to one logit for each patch: `layers` halvings, two more convolutions, leaky ReLU between."""

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "group") -> None:
        super().__init__()
        one_of("discriminator.norm", norm, _NORMS)
        if layers > _MOST_LAYERS:
            raise InputError(f"discriminator.layers={layers} leave nothing of an image; choose at most {_MOST_LAYERS}.")
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv2d(width, wider := channels * 2 ** min(level, 3), 4, stride=stride, padding=1, bias=False),
                _NORMS[norm](wider),
                nn.LeakyReLU(0.2),
            ]
            width = wider
        parts.append(nn.Conv2d(width, 1, 4, padding=1))
        self.smallest_image = 3 * 2**layers
        self.network = nn.Sequential(*parts)
        for name, weight in self.named_parameters():  # N(0, 0.02), of norms N(1, 0.02), as in the discriminator's paper
            if name.endswith("weight"):
                nn.init.normal_(weight, 0.0 if weight.ndim == 4 else 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => logits (B, 1, h, w), high for real."""
        if min(images.shape[-2:]) < self.smallest_image:
            raise InputError(
                f"images of {images.shape[-2]}x{images.shape[-1]} are too small for this discriminator, which needs "
                f"{self.smallest_image} pixels a side; choose fewer discriminator.layers or larger images."
            )
        return self.network(images.to(next(self.parameters()).dtype))
