"""A first stage that works on images of any size in tiles, so that the tile bounds the memory.

separate: every part is encoded or decoded on its own and neighbours are blended where they overlap. No seam, but each
    part has its own group-norm statistics, so tones drift from those of the whole image.
shared: all parts of a group norm use the statistics of the whole image, gathered part by part before they are used.
    The result is that of the full image up to rounding; see `layered.py`.
"""

from typing import Any

from torch import Tensor, nn

from ldmlab.contracts import Posterior, Reconstruction
from ldmlab.errors import InputError, one_of
from ldmlab.first_stages.encoder_decoder import check_image_size
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.layered import run_in_parts, steps_of
from ldmlab.first_stages.vq import CodedAutoencoder
from ldmlab.nn.tiling import blended, latent_side, windows

NORMS = ("shared", "separate")


class TiledFirstStage:
    """A frozen first stage that works in square tiles, with the interface of the one inside."""

    def __init__(
        self,
        first_stage: nn.Module,
        tile: int = 512,  # side of a part, px of the image
        norms: str = "shared",  # shared | separate: group-norm statistics
        kept_mib: int | None = None,  # shared only: larger feature maps of an image are computed again in every pass;
        # None: twice a part's map at the finest level, 256 MiB for the paper's first stages and parts of 512
    ) -> None:
        self.inner: Any = first_stage
        self.downsampling: int = first_stage.downsampling  # type: ignore[assignment]
        self.latent_channels: int = first_stage.latent_channels  # type: ignore[assignment]
        one_of("tile_norms", norms, NORMS)
        if norms == "shared" and not isinstance(first_stage, KLAutoencoder | CodedAutoencoder):
            if any(isinstance(module, nn.GroupNorm) for module in first_stage.modules()):
                kind = type(first_stage).__name__
                raise InputError(f"tile_norms=shared supports KL and VQ first stages, not {kind}; choose separate.")
            norms = "separate"  # there are no statistics to share
        if kept_mib is not None and kept_mib < 1:
            raise InputError(f"kept_mib={kept_mib} keeps nothing between two layers; choose 1 or more.")
        self.tile, self.norms, self.latent_tile = tile, norms, latent_side("tile", tile, self.downsampling, least=2)
        first = getattr(getattr(self.inner, "encoder", None), "input", None)
        pixel_bytes = (
            0 if first is None else int(first.out_channels) * first.weight.element_size()
        )  # at the finest level
        self.kept_bytes = 2 * tile**2 * pixel_bytes if kept_mib is None else kept_mib * 2**20

    def encode(self, images: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] => raw latents (B, C, H / f, W / f), float32."""
        check_image_size(images, self.downsampling)
        if max(images.shape[2:]) <= self.tile:
            return self.inner.encode(images)
        if self.norms == "shared":
            features = run_in_parts(steps_of(self.inner.encoder), images, self.tile, self.kept_bytes * len(images))
            return self.inner.posterior_of(features)
        cut, put = self._windows((images.shape[2] // self.downsampling, images.shape[3] // self.downsampling))
        moments = blended(lambda i: self.inner.encode(put[i].of(images)).moments(), cut)
        return Posterior.from_moments(moments, self.latent_channels)

    def decode(self, raw_latents: Tensor) -> Tensor:
        """(B, C, h, w) => (B, 3, f h, f w), about [-1, 1]."""
        if max(raw_latents.shape[2:]) * self.downsampling <= self.tile:
            return self.inner.decode(raw_latents)
        if self.norms == "shared":
            features = self.inner.features_of(raw_latents)
            kept = self.kept_bytes * len(features)
            return run_in_parts(steps_of(self.inner.decoder), features, self.latent_tile, kept)
        cut, put = self._windows((raw_latents.shape[2], raw_latents.shape[3]))
        return blended(lambda i: self.inner.decode(cut[i].of(raw_latents)), put)

    def _windows(self, size: tuple[int, int]) -> tuple[list[Any], list[Any]]:
        """The same windows of a latent of `size` and of its image; they overlap by a quarter."""
        part = self.latent_tile
        return windows(size, part, part // 4), windows(size, part, part // 4, scale=self.downsampling)

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode, draw a latent with the given noise (B, C, h, w), decode; no penalties, which only training needs."""
        return Reconstruction(self.decode(self.encode(images).sample(noise)), {})

    @property
    def last_layer(self) -> Tensor:
        """Not available: tiles are for trained first stages."""
        raise InputError("a first stage in parts cannot be trained; train it on crops of one size.")
