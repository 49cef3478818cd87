"""First stages of codes: every latent vector is replaced by the vector of a code before decoding."""

from collections.abc import Sequence

from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.first_stages.encoder_decoder import Architecture, Autoencoder, initialise
from ldmlab.first_stages.quantiser import Quantiser, VectorQuantiser
from ldmlab.values import LatentChange


class CodedAutoencoder(Autoencoder):
    """Images to latents in front of a quantiser and back; subclasses set the quantiser, after the weights here."""

    uses_noise = False
    quantiser: Quantiser

    def __init__(self, arch: Architecture, latent_channels: int) -> None:
        inner = arch.latent_channels
        super().__init__(arch, latent_channels=latent_channels, encoder_channels=inner)
        self.to_latent = nn.Conv2d(inner, latent_channels, 1)
        self.from_latent = nn.Conv2d(latent_channels, inner, 1)

    def _take(self, quantiser: Quantiser, initialisation: str) -> None:
        self.quantiser, self.codebook_size = quantiser, quantiser.codebook_size
        initialise(self, initialisation)

    def posterior_of(self, features: Tensor) -> Posterior:
        """What the encoder gives, (B, C', h, w) => the vectors before the quantiser, (B, C, h, w), float32."""
        return Posterior(self.quantiser.bounded(self.to_latent(features).float()))

    def features_of(self, raw_latents: Tensor) -> Tensor:
        """Quantise (B, C, h, w) => features for the decoder, (B, C', h, w)."""
        return super().features_of(self.quantise(raw_latents))

    def quantise(self, raw_latents: Tensor) -> Tensor:
        """The vectors of the nearest codes, (B, C, h, w), float32."""
        return self.quantiser.quantise(raw_latents.float())[0]

    def reconstruct(self, images: Tensor, noise: Tensor, change: LatentChange | None = None) -> Reconstruction:
        """Encode, quantise, decode (the noise is not used), with the quantiser's penalties."""
        latents = self.encode(images).mean
        quantised = self.quantiser(latents if change is None else change(latents))
        images = self.decoder(super().features_of(quantised.latents))
        return Reconstruction(images, quantised.penalties, quantised.codes, latents)

    def update_codebook(self) -> dict[str, Tensor]:
        """Once a training step: codebook updates as configured; by parameter, which rows may be new ones, bool."""
        rows = self.quantiser.update()
        return {} if rows is None else {"quantiser.codebook.weight": rows}


class QuantisedAutoencoder(CodedAutoencoder):
    """The paper's autoencoder around any quantiser, which decides the channels of a latent and the codes."""

    def __init__(
        self,
        *,
        channel_mult: Sequence[float],  # widths of the levels, finest first; f = 2^(levels - 1)
        quantiser: Quantiser,  # of ldmlab.first_stages.lookup_free (FSQ, LFQ, BSQ) or index_backpropagation (IBQ)
        bottleneck_channels: int | None = None,  # between networks and latent projection; default: as the latent
        channels: int = 128,  # width of the finest level
        num_res_blocks: int = 2,  # per level of the encoder; the decoder has one more
        attention_downsampling: Sequence[int] = (),  # levels with attention, by downsampling factor
        mid_attention: bool = True,  # attention at the coarsest level's middle
        norm_groups: int = 32,
        dropout: float = 0.0,
        initialisation: str = "torch",  # of the convolutions: torch, as released | he, for short runs
    ) -> None:
        inner = bottleneck_channels or quantiser.width
        arch = Architecture(
            channels, channel_mult, num_res_blocks, attention_downsampling, mid_attention, inner, norm_groups, dropout
        )
        super().__init__(arch, quantiser.width)
        self._take(quantiser, initialisation)


class VQModel(CodedAutoencoder):
    """The one with a learned codebook, of which the nearest vector is taken (vq-f4 ... vq-f16 of the paper)."""

    idle_without = "codebook_weight: codebook_decay=null"

    def __init__(
        self,
        *,
        channel_mult: Sequence[float],  # widths of the levels, finest first; f = 2^(levels - 1)
        latent_channels: int,  # channels of a latent and of a codebook vector
        codebook_size: int,
        encoder_weight: float = 1.0,  # of the penalty that moves the encoder to the codebook
        codebook_weight: float = 0.25,  # of the penalty that moves the codebook to the encoder
        codebook_decay: float | None = None,  # 0.99: codes are running means of vectors, no codebook_weight
        restart_below: float | None = None,  # 0.01: a code used less than this share of the average restarts
        cosine: bool = False,  # compare directions: vectors and codes at unit length
        bottleneck_channels: int | None = None,  # between networks and latent projection; default: latent_channels
        channels: int = 128,  # width of the finest level
        num_res_blocks: int = 2,  # per level of the encoder; the decoder has one more
        attention_downsampling: Sequence[int] = (),  # levels with attention, by downsampling factor
        mid_attention: bool = True,  # attention at the coarsest level's middle
        norm_groups: int = 32,
        dropout: float = 0.0,
        initialisation: str = "torch",  # of the convolutions: torch, as released | he, for short runs
    ) -> None:
        inner = bottleneck_channels or latent_channels
        arch = Architecture(
            channels, channel_mult, num_res_blocks, attention_downsampling, mid_attention, inner, norm_groups, dropout
        )
        super().__init__(arch, latent_channels)
        quantiser = VectorQuantiser(
            codebook_size,
            latent_channels,
            encoder_weight,
            codebook_weight,
            decay=codebook_decay,
            restart_below=restart_below,
            cosine=cosine,
        )
        self._take(quantiser, initialisation)
