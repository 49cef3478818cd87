"""First stages whose encoder is frozen: patch features of a network that was trained for something else, and a decoder.

Zheng et al., "Diffusion Transformers with Representation Autoencoders" (RAE), arXiv 2510.11690. Here the decoder is
the paper's convolutional one; theirs is a vision transformer.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.contracts import PatchEncoder, Posterior
from ldmlab.errors import InputError
from ldmlab.first_stages.encoder_decoder import Architecture, Network, WithoutSpread, check_image_size, initialise


class RepresentationAutoencoder(WithoutSpread):
    """Latents are an encoder's patch features, each at mean 0 and deviation 1 over its channels; no penalty.

    f = 2^(levels of the decoder - 1); a grid of another size is resampled bilinearly to (H / f, W / f). The encoder's
    weights are saved with the decoder's, so that a model folder needs no other file.
    """

    def __init__(
        self,
        *,
        encoder: PatchEncoder,  # frozen; its width is the number of latent channels
        channel_mult: Sequence[float],  # widths of the decoder's levels, finest first
        channels: int = 128,  # width of the finest level
        num_res_blocks: int = 2,  # per level, less one
        attention_downsampling: Sequence[int] = (),  # levels with attention, by downsampling factor
        mid_attention: bool = True,  # attention at the coarsest level's middle
        norm_groups: int = 32,
        dropout: float = 0.0,
        initialisation: str = "torch",  # of the convolutions: torch | he, for short runs
    ) -> None:
        super().__init__()
        self.downsampling, self.latent_channels = 2 ** (len(channel_mult) - 1), encoder.width
        arch = Architecture(
            channels, channel_mult, num_res_blocks, attention_downsampling, mid_attention, encoder.width, norm_groups,
            dropout,
        )  # fmt: skip
        assert isinstance(encoder, nn.Module)
        self.encoder = encoder.eval().requires_grad_(False)
        self.decoder = Network(arch, encoder.width, 3, decodes=True)
        initialise(self.decoder, initialisation)

    def encode(self, images: Tensor) -> Posterior:
        """Square images (B, 3, H, H) in [-1, 1] => raw latents (B, D, H / f, H / f), float32, without gradient."""
        check_image_size(images, self.downsampling)
        height, width = images.shape[-2:]
        if height != width:
            raise InputError(f"images of {height}x{width}: a frozen encoder takes square images; crop or tile them.")
        features = self.encoder(images).float()  # (B, D, h', w')
        side = (height // self.downsampling, width // self.downsampling)
        if features.shape[-2:] != side:
            features = F.interpolate(features, size=side, mode="bilinear", align_corners=False)
        return Posterior(F.layer_norm(features.movedim(1, -1), (self.latent_channels,)).movedim(-1, 1))

    @property
    def last_layer(self) -> Tensor:
        """Weight of the convolution that gives the pixels."""
        return self.decoder.output.weight
