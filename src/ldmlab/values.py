"""Values that parts hand to each other; `contracts.py` has them too, under the same names.

Shapes: B batch, C latent channels, h w latent height and width, H W image height and width, L tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Inputs of the denoiser in addition to the noisy latent; a backbone lists the slots it accepts."""

    tokens: Tensor | None = None  # (B, L, D)     text, class, boxes: cross-attention
    spatial: Tensor | None = None  # (B, C, h, w)  mask, low resolution, semantic map: concatenated to x
    vector: Tensor | None = None  # (B, D)        added to the time embedding
    numbers: Tensor | None = None  # (B or 1, n)  embedded beside the time: t - r of a step, a guidance scale


@dataclass(frozen=True)
class Posterior:
    """Raw latents as a diagonal Gaussian; without `logvar` there is no spread and the mean is the latent."""

    mean: Tensor  # (B, C, h, w)  codes: the vector before the quantiser; identity: the pixels
    logvar: Tensor | None = None  # (B, C, h, w), clamped to [-30, 20]

    def sample(self, noise: Tensor) -> Tensor:
        """mean + exp(logvar / 2) * noise, (B, C, h, w)."""
        if self.logvar is None:
            return self.mean
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def moments(self) -> Tensor:
        """Mean and, if there is one, log-variance stacked on the channel axis: (B, 2C or C, h, w)."""
        return self.mean if self.logvar is None else torch.cat([self.mean, self.logvar], dim=1)

    @staticmethod
    def from_moments(moments: Tensor, latent_channels: int) -> "Posterior":
        """The inverse of `moments`."""
        if moments.shape[1] == latent_channels:
            return Posterior(moments)
        mean, logvar = moments.split(latent_channels, dim=1)
        return Posterior(mean, logvar)


@dataclass(frozen=True)
class Reconstruction:
    """Output of a first stage for a batch of images."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    penalties: dict[str, Tensor]  # by name (kl | codebook | entropy | commitment): scalar, mean over the batch
    codes: Tensor | None = None  # (B, h, w) of first stages with a quantiser
    latents: Tensor | None = None  # (B, C, h, w), raw, as drawn; which alignment with an encoder needs


@dataclass(frozen=True)
class Prepared:
    """A conditioning with everything derived from it that is the same at every step of one sample."""

    conditioning: Conditioning
    cache: Any  # the backbone's own: text keys and values, projections


@dataclass(frozen=True)
class LatentSpec:
    channels: int
    height: int
    width: int
    downsampling: int

    @property
    def values(self) -> int:
        """Of one latent."""
        return self.channels * self.height * self.width


LatentChange = Callable[[Tensor], Tensor]  # raw latents => what is quantised and decoded, while a first stage trains
Encode = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [-1, 1] => final latents (posterior mean)


class Level(NamedTuple):
    """A noise level: x = alpha clean + sigma noise; `time` is the network's input t, None at the end."""

    alpha: float
    sigma: float
    time: float | None
    start: float | None = None  # of a further evaluation in a step: the time of the first one, see `Guidance.acts`
    to: "Level | None" = None  # where the step goes, for networks of average velocities; None: they give that at t
    spread: float | None = None  # of the noise that sampling begins with; None: sigma on paths without scaling, else 1


Denoise = Callable[[Tensor, Level], Tensor]  # conditions and guidance bound => clean estimate, x's dtype or float64
Noise = Callable[[int], Tensor]  # of a step, in x's shape
AfterStep = Callable[[int, Tensor, Tensor], Tensor]  # (step, x, clean estimate) => x


class Solver(NamedTuple):
    """The sampler, spacing and number of steps that a path is sampled with unless others are named."""

    sampler: str
    spacing: str
    steps: int
    multistep: str | None = None  # spacing of samplers with `extrapolates`; None: the same
