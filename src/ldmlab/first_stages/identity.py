"""The first stage that does nothing (f = 1): the latent is the image, for the paper's pixel-space rows."""

from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.errors import InputError


class Identity(nn.Module):
    """(B, 3, H, W) in [-1, 1], in and out; without spread, penalty or weights."""

    downsampling = 1
    latent_channels = 3
    uses_noise = False

    def encode(self, images: Tensor) -> Posterior:
        return Posterior(images)

    def decode(self, raw_latents: Tensor) -> Tensor:
        return raw_latents

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        return Reconstruction(images, {})

    @property
    def last_layer(self) -> Tensor:
        raise InputError("first_stage=identity has no weights to train; choose kl_f4 or another first stage.")
