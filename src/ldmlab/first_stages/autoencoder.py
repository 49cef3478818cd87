"""What the KL and VQ first stages share: the convolutional networks, and a latent between 1 x 1 convolutions."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from ldmlab.contracts import Posterior
from ldmlab.first_stages.encoder_decoder import Architecture, Decoder, Encoder, check_image_size


class Autoencoder(nn.Module, ABC):
    """Images to features (C' channels) to latents (C channels) and back; subclasses say how features become latents.

    They add `from_latent` after their own way in: the order of parameters is that of optimizer states on disk.
    """

    from_latent: nn.Conv2d

    def __init__(self, arch: Architecture, *, latent_channels: int, encoder_channels: int) -> None:
        super().__init__()
        self.downsampling = arch.downsampling
        self.latent_channels = latent_channels
        self.encoder = Encoder(arch, out_channels=encoder_channels)
        self.decoder = Decoder(arch)

    @abstractmethod
    def posterior_of(self, features: Tensor) -> Posterior:
        """What the encoder gives, (B, C', h, w) => raw latents (B, C, h, w), float32."""

    def features_of(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => what the decoder takes, (B, C', h, w)."""
        return self.from_latent(raw_latents.to(self.from_latent.weight.dtype))

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => raw latents (B, C, H / f, W / f), float32."""
        check_image_size(images, self.downsampling)
        return self.posterior_of(self.encoder(images))

    def decode(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, 3, f h, f w), about [-1, 1]."""
        return self.decoder(self.features_of(raw_latents))

    @property
    def last_layer(self) -> Tensor:
        """Weight of the convolution that gives the pixels."""
        return self.decoder.output.weight
