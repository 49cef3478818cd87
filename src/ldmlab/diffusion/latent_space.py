"""Pixels, raw latents and final latents: a first stage and the latent scale, frozen.

Pixels (B, 3, H, W) are in [-1, 1]; only this file sees raw latents; final latents (B, C, h, w) are normalised.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from ldmlab.contracts import FirstStage, Posterior
from ldmlab.diffusion.latent_scale import LatentScale
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float
from ldmlab.randomness import normal


class LatentSpace(nn.Module):
    """The space in which diffusion works: encode, decode, latents of training batches."""

    def __init__(self, first_stage: nn.Module, latent_scale: LatentScale) -> None:
        super().__init__()
        self.first_stage = first_stage.requires_grad_(False).eval()
        self.latent_scale = latent_scale
        self._instead: FirstStage | None = None

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but the first stage, which never leaves evaluation."""
        super().train(mode)
        self.first_stage.eval()
        return self

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> Posterior:
        """Raw latents of pixels, float32 whatever precision surrounds it."""
        with torch.autocast(pixels.device.type, enabled=False):
            return self._stage.encode(pixels.float())

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1] => final latents, the posterior's mean."""
        return self.latent_scale.normalise(self.posterior(pixels).mean)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Final latents (B, C, h, w) => pixels (B, 3, H, W) in about [-1, 1]."""
        return self._stage.decode(self.latent_scale.denormalise(latents))

    def quantised(self, latents: Tensor) -> Tensor:
        """Final latents whose raw ones are the nearest codebook vectors; in the input's dtype."""
        quantise = getattr(self.first_stage, "quantise", None)
        if quantise is None:
            name = type(self.first_stage).__name__
            raise InputError(f"sampler.quantize_x0=true: the first stage {name} has no codebook; leave it out.")
        return self.latent_scale.normalise(quantise(self.latent_scale.denormalise(latents))).to(latents.dtype)

    def pixels(self, latents: Tensor) -> Tensor:
        """As `decode` with the first stage itself, with gradients for the latents."""
        return self.first_stage.decode(self.latent_scale.denormalise(latents))  # type: ignore[operator]

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], seed: int) -> Tensor:
        """Final latents of a training batch, drawn from the posterior by (seed, position); float32."""
        if "moments" in batch:
            posterior = Posterior.from_moments(batch["moments"].float(), self._stage.latent_channels)
        elif "image" in batch:
            posterior = self.posterior(to_float(batch["image"]))
        else:
            raise InputError("the batches hold neither latents nor images; choose data= with one of them.")
        if posterior.logvar is None:
            return self.latent_scale.normalise(posterior.mean)
        noise = normal(seed, "posterior", batch["position"], tuple(posterior.mean.shape[1:]))
        return self.latent_scale.normalise(posterior.sample(noise))

    @contextmanager
    def through(self, first_stage: FirstStage | None) -> Iterator[None]:
        """Inside, images are encoded and decoded by this one, which gives the same latents: in parts."""
        before, self._instead = self._instead, first_stage
        try:
            yield
        finally:
            self._instead = before

    @property
    def _stage(self) -> FirstStage:
        return self._instead or self.first_stage  # type: ignore[return-value]
