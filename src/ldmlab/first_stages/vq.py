"""The VQ first stage: every latent vector is replaced by the nearest vector of a learned codebook before decoding."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.first_stages.encoder_decoder import Architecture, Decoder, Encoder, check_image_size, initialise

_DISTANCES_AT_ONCE = 2**25  # bounds the memory of the search to 128 MiB


class Quantised(NamedTuple):
    """What the quantiser gives."""

    latents: Tensor  # (B, C, h, w): codebook vectors; the gradient passes straight through to the input
    codes: Tensor  # (B, h, w) int64
    penalty: Tensor  # scalar


class Quantiser(nn.Module):
    """Nearest codebook vector with a straight-through gradient.

    penalty = encoder_weight mean |sg(e) - z|^2 + codebook_weight mean |e - sg(z)|^2, sg: stop gradient. The released
    models weight the codebook's side by beta = 0.25 and the encoder's by 1 (the reverse of the VQ-VAE paper).
    """

    def __init__(self, codebook_size: int, width: int, encoder_weight: float, codebook_weight: float) -> None:
        super().__init__()
        self.codebook = nn.Embedding(codebook_size, width)
        nn.init.uniform_(self.codebook.weight, -1.0 / codebook_size, 1.0 / codebook_size)
        self.encoder_weight = encoder_weight
        self.codebook_weight = codebook_weight

    def forward(self, latents: Tensor) -> Quantised:
        """(B, C, h, w) => vectors of the codebook in the same shape, their codes and the penalty, in float32."""
        latents = latents.float()
        codes = self.nearest(latents.detach().movedim(1, -1))  # (B, h, w)
        chosen = F.embedding(codes, self.codebook.weight).movedim(-1, 1)  # (B, C, h, w)
        encoder_side = F.mse_loss(latents, chosen.detach())
        codebook_side = F.mse_loss(chosen, latents.detach())
        penalty = self.encoder_weight * encoder_side + self.codebook_weight * codebook_side
        return Quantised(latents + (chosen - latents).detach(), codes, penalty)

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """Codes of the nearest codebook vectors, (..., C) => (...) int64; the smallest code wins a tie."""
        codebook = self.codebook.weight.float()  # (K, C)
        rows = max(_DISTANCES_AT_ONCE // len(codebook), 1)
        with _full_precision(vectors.device.type):  # half precision would confuse neighbours
            squares = codebook.square().sum(dim=1)  # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 changes nothing
            parts = vectors.reshape(-1, vectors.shape[-1]).float().split(rows)
            codes = [torch.addmm(squares, part, codebook.T, alpha=-2.0).argmin(dim=1) for part in parts]
        return torch.cat(codes).reshape(vectors.shape[:-1])


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """No autocast inside; some devices (meta) have none to switch off."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


class VQModel(nn.Module):
    """Pictures to latents in front of a quantiser and back (vq-f4 ... vq-f16 of the paper)."""

    def __init__(
        self,
        *,
        channel_mult: Sequence[int],  # widths of the levels, finest first; f = 2^(levels - 1)
        latent_channels: int,  # channels of a latent and of a codebook vector
        codebook_size: int,
        encoder_weight: float = 1.0,  # of the penalty that moves the encoder to the codebook
        codebook_weight: float = 0.25,  # of the penalty that moves the codebook to the encoder
        bottleneck_channels: int | None = None,  # between networks and latent projection; default: latent_channels
        channels: int = 128,  # width of the finest level
        num_res_blocks: int = 2,  # per level of the encoder; the decoder has one more
        attention_downsampling: Sequence[int] = (),  # levels with attention, by downsampling factor
        mid_attention: bool = True,  # attention at the coarsest level's middle
        norm_groups: int = 32,
        dropout: float = 0.0,
        initialisation: str = "torch",  # of the convolutions: torch, as released | he, for short runs
    ) -> None:
        super().__init__()
        inner = bottleneck_channels or latent_channels
        arch = Architecture(
            channels=channels,
            channel_mult=tuple(channel_mult),
            num_res_blocks=num_res_blocks,
            attention_downsampling=tuple(attention_downsampling),
            mid_attention=mid_attention,
            latent_channels=inner,
            norm_groups=norm_groups,
            dropout=dropout,
        )
        self.downsampling = arch.downsampling
        self.latent_channels = latent_channels
        self.codebook_size = codebook_size
        self.encoder = Encoder(arch, out_channels=inner)
        self.decoder = Decoder(arch)
        self.to_latent = nn.Conv2d(inner, latent_channels, 1)
        self.from_latent = nn.Conv2d(latent_channels, inner, 1)
        self.quantiser = Quantiser(codebook_size, latent_channels, encoder_weight, codebook_weight)
        initialise(self, initialisation)

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => the vectors before the quantiser, (B, C, H / f, W / f), float32."""
        check_image_size(images, self.downsampling)
        return Posterior(self.to_latent(self.encoder(images)).float())

    def decode(self, raw_latents: Tensor) -> Tensor:
        """Quantise (B, C, h, w), then decode: (B, 3, f h, f w), about [-1, 1]."""
        return self.decoder(self.from_latent(self.quantiser(raw_latents).latents))

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode, quantise, decode (the noise is not used); the penalty is `codebook`."""
        quantised = self.quantiser(self.encode(images).mean)
        decoded = self.decoder(self.from_latent(quantised.latents))
        return Reconstruction(decoded, {"codebook": quantised.penalty}, quantised.codes)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the convolution that gives the pixels."""
        return self.decoder.output.weight
