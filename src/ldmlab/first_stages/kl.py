"""The KL first stage: a Gaussian posterior per image, pulled slightly towards a standard normal."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.errors import InputError
from ldmlab.first_stages.encoder_decoder import Architecture, Autoencoder, initialise
from ldmlab.values import LatentChange

_LOGVAR_RANGE = (-30.0, 20.0)


class KLAutoencoder(Autoencoder):
    """Images to a diagonal Gaussian over latents and back (kl-f4 ... kl-f32 of the paper)."""

    def __init__(
        self,
        *,
        channel_mult: Sequence[float],  # widths of the levels, finest first; f = 2^(levels - 1)
        latent_channels: int,  # channels of a latent
        bottleneck_channels: int | None = None,  # between networks and latent projection; default: latent_channels
        channels: int = 128,  # width of the finest level
        num_res_blocks: int = 2,  # per level of the encoder; the decoder has one more
        attention_downsampling: Sequence[int] = (),  # levels with attention, by downsampling factor
        mid_attention: bool = True,  # attention at the coarsest level's middle
        norm_groups: int = 32,
        dropout: float = 0.0,
        initialisation: str = "torch",  # of the convolutions: torch, as released | he, for short runs
        initial_logvar: float = 0.0,  # added to the posterior's log-variance at the start; -6 is nearly no noise
        latent_projection: bool = True,  # 1 x 1 convolutions around the latent; False: none, as in SD3 and Flux
    ) -> None:
        inner = bottleneck_channels or latent_channels
        if not latent_projection and inner != latent_channels:
            raise InputError(
                f"first_stage.bottleneck_channels={inner} needs a projection to latent_channels={latent_channels}; "
                "leave it out, or set latent_projection=true."
            )
        arch = Architecture(
            channels, channel_mult, num_res_blocks, attention_downsampling, mid_attention, inner, norm_groups, dropout
        )
        super().__init__(arch, latent_channels=latent_channels, encoder_channels=2 * inner)
        self.to_moments = nn.Conv2d(2 * inner, 2 * latent_channels, 1) if latent_projection else nn.Identity()
        self.from_latent = nn.Conv2d(latent_channels, inner, 1) if latent_projection else nn.Identity()
        initialise(self, initialisation)
        last = cast(nn.Conv2d, self.to_moments if latent_projection else self.encoder.output)
        with torch.no_grad():
            cast(Tensor, last.bias)[latent_channels:] += initial_logvar

    def posterior_of(self, features: Tensor) -> Posterior:
        """What the encoder gives, (B, C', h, w) => mean and log-variance (B, C, h, w), float32."""
        mean, logvar = self.to_moments(features).float().chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*_LOGVAR_RANGE))

    def reconstruct(self, images: Tensor, noise: Tensor, change: LatentChange | None = None) -> Reconstruction:
        """Encode, draw a latent with the given noise (B, C, h, w), decode; the penalty is `kl`."""
        posterior = self.encode(images)
        penalties = {"kl": kl_to_standard_normal(posterior).mean()}
        latents = posterior.sample(noise)
        return Reconstruction(self.decode(latents if change is None else change(latents)), penalties, latents=latents)


def kl_to_standard_normal(posterior: Posterior) -> Tensor:
    """1/2 sum (mean^2 + var - 1 - logvar) over channels and positions: (B,)."""
    assert posterior.logvar is not None
    terms = posterior.mean**2 + torch.exp(posterior.logvar) - 1.0 - posterior.logvar
    return 0.5 * terms.sum(dim=(1, 2, 3))
