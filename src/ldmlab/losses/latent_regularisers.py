"""Regularisers of a first stage that act on its latents while it trains, off unless chosen; they combine.

Equivariance: Kouzelis et al., "EQ-VAE: Equivariance Regularized Latent Space", arXiv 2502.09509, equation 5: the
transformed latent is decoded and compared with the transformed image. Noise: a decoder for latents that are not quite
right, as in Zheng et al., "Diffusion Transformers with Representation Autoencoders", arXiv 2510.11690. Masked
channels: Chen et al., "DC-AE 1.5", arXiv 2508.00413: the first channels learn to serve alone.
"""

import math
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.errors import InputError, one_of
from ldmlab.randomness import below, draw, uniform
from ldmlab.values import LatentChange

NoiseSpread = Literal["fixed", "uniform"]  # every image's scale: the same | drawn from 0 to it
Side = tuple[int, int]  # height, width


class Regularised(NamedTuple):
    """A micro-batch under the regularisers."""

    images: Tensor  # what is encoded
    target: Tensor  # what the decoded images are compared with
    change: LatentChange  # of the raw latents, before they are quantised and decoded


class LatentRegularisers:
    """A step draws one scale and turn for all its images, on every process; noise and masks belong to each image."""

    idle_without = (
        "least_scale: equivariance or low_resolution, rotate: equivariance, noise_spread: noise, least_channels: masked"
    )

    def __init__(
        self,
        *,
        equivariance: float = 0.0,  # share of steps that decode a scaled and turned latent (EQ-VAE: 0.5)
        low_resolution: float = 0.0,  # share of the other steps that train on smaller images (EQ-VAE: 0.25)
        least_scale: float = 0.25,  # scales are whole latent pixels from this share of the side up; 1: no scaling
        rotate: bool = True,  # transformed latents are turned by 90, 180 or 270 degrees
        noise: float = 0.0,  # deviation of Gaussian noise, in units of the raw latents (RAE: 0.8)
        noise_spread: NoiseSpread = "uniform",  # uniform: each image's deviation is drawn from 0 to it | fixed
        masked: float = 0.0,  # share of images whose last channels, a random number of them, are zero
        least_channels: int = 1,  # that a mask leaves
    ) -> None:
        shares = {"equivariance": equivariance, "low_resolution": low_resolution, "masked": masked}
        for name, value in {**shares, "least_scale": least_scale}.items():
            if not 0 <= value <= 1 or (name == "least_scale" and value == 0):
                raise InputError(f"loss.regularisers.{name}={value} is no share; choose a number between 0 and 1.")
        if noise < 0:
            raise InputError(f"loss.regularisers.noise={noise} is no deviation; choose 0 (none) or more.")
        if least_scale == 1 and (low_resolution or (equivariance and not rotate)):
            raise InputError(
                "loss.regularisers.least_scale=1 leaves nothing to scale; choose less, for instance 0.25, or turns "
                "alone: equivariance with rotate=true and low_resolution=0."
            )
        one_of("loss.regularisers.noise_spread", noise_spread, get_args(NoiseSpread))
        self.equivariance, self.low_resolution = equivariance, low_resolution
        self.least_scale, self.rotate = least_scale, rotate
        self.noise, self.noise_spread = noise, noise_spread
        self.masked, self.least_channels = masked, least_channels

    @property
    def active(self) -> bool:
        """Whether any of them is on."""
        return any((self.equivariance, self.low_resolution, self.noise, self.masked))

    def __call__(
        self, images: Tensor, position: Tensor, *, seed: int, step_position: int, downsampling: int, smallest: int = 1
    ) -> Regularised:
        """Images (B, 3, H, W) at these positions of a step that began at `step_position`; sides are >= smallest px."""
        disturbed = partial(self._disturbed, position=position.to(images.device), seed=seed)
        if not (self.equivariance or self.low_resolution):
            return Regularised(images, images, disturbed)
        scales = self._scales(
            images.shape[-2] // downsampling, images.shape[-1] // downsampling, downsampling, smallest
        )
        share, low, place, turn = uniform(seed, "equivariance", torch.tensor([step_position]), (4,))[0].tolist()
        side, turns = scales[int(place * len(scales))], 1 + int(turn * 3) if self.rotate else 0
        in_pixels = side[0] * downsampling, side[1] * downsampling
        if share < self.equivariance:
            return Regularised(images, moved(images, in_pixels, turns), lambda z: disturbed(moved(z, side, turns)))
        if low < self.low_resolution:
            images = moved(images, in_pixels, 0)
        return Regularised(images, images, disturbed)

    def _scales(self, height: int, width: int, downsampling: int, smallest: int) -> list[Side]:
        """Sides of scaled latents, smallest first; the full side where nothing is to be scaled."""
        if self.least_scale == 1:
            return [(height, width)]
        short = min(height, width)
        least = math.ceil(short * self.least_scale)
        if least * downsampling < smallest or least >= short:
            fitting = min(-(-smallest // downsampling) / short, 1.0)
            raise InputError(
                f"loss.regularisers.least_scale={self.least_scale} would shrink latents of {height}x{width} to a "
                f"side of {least} ({least * downsampling} px), where the loss needs {smallest} px and a smaller side "
                f"than {short}; choose {fitting:.2f} or more and below 1, larger images, or 1 for turns alone."
            )
        return [(height * k // short, width * k // short) for k in range(least, short)]

    def _disturbed(self, latents: Tensor, position: Tensor, seed: int) -> Tensor:
        """Raw latents (B, C, h, w) with noise and without the masked channels."""
        _, channels, *side = latents.shape
        shapes = {"latent noise": (channels, *side)} if self.noise else {}
        scaled = ["scale of latent noise"] if self.noise and self.noise_spread == "uniform" else []
        numbers = draw(seed, position, shapes, scaled + ["masked channels"] * (self.masked > 0))
        if self.noise:
            scale = self.noise * numbers["scale of latent noise"] if scaled else latents.new_full((1,), self.noise)
            latents = latents + scale.to(latents.dtype)[:, None, None, None] * numbers["latent noise"]
        if self.masked:
            if not 0 < self.least_channels < channels:
                raise InputError(
                    f"loss.regularisers.least_channels={self.least_channels} must leave 1 .. {channels - 1} of the "
                    f"{channels} latent channels; choose such a number, or masked=0."
                )
            u = numbers["masked channels"]  # below `masked` it is, divided by that, a uniform number again
            kept = self.least_channels + below(u / self.masked, channels - self.least_channels)  # (B,)
            kept = kept.masked_fill(u >= self.masked, channels)
            latents = latents * (torch.arange(channels, device=kept.device) < kept[:, None])[:, :, None, None]
        return latents


def moved(x: Tensor, side: Side, turns: int) -> Tensor:
    """(B, C, h, w) scaled bilinearly to `side`, then turned by quarters."""
    if x.shape[-2:] != side:
        x = F.interpolate(x, size=side, mode="bilinear", align_corners=False)
    return torch.rot90(x, turns, dims=(-1, -2)).contiguous() if turns else x
