"""What the parts of ldmlab promise each other: the only types that cross from one room to another.

Shapes: B batch, C latent channels, h w latent height and width, H W image height and width, L tokens, D width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What the denoiser is told beside the noisy latent; a backbone says which slots it accepts."""

    tokens: Tensor | None = None  # (B, L, D)     text, class, boxes: cross-attention
    spatial: Tensor | None = None  # (B, C, h, w)  mask, low resolution, semantic map: concatenated to x
    vector: Tensor | None = None  # (B, D)        added to the time embedding


@dataclass(frozen=True)
class Posterior:
    """Raw latents as a diagonal Gaussian; without `logvar` there is no spread and the mean is the latent."""

    mean: Tensor  # (B, C, h, w)  VQ: the vector before the quantiser; identity: the pixels
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
    """What a first stage gives back for a batch of images."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    penalties: dict[str, Tensor]  # by name (kl | codebook): scalar, mean over the batch
    codes: Tensor | None = None  # (B, h, w) indices into the codebook, VQ only


class FirstStage(Protocol):
    """Images to raw latents and back; a `torch.nn.Module`."""

    downsampling: int
    latent_channels: int

    def encode(self, images: Tensor) -> Posterior: ...  # (B, 3, H, W) in [-1, 1]

    def decode(self, raw_latents: Tensor) -> Tensor: ...  # => (B, 3, H, W) in [-1, 1]; VQ quantises first

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction: ...  # noise: (B, C, h, w)

    @property
    def last_layer(self) -> Tensor: ...  # weight of the last convolution, for the adversary's adaptive weight


@dataclass(frozen=True)
class Prepared:
    """A conditioning with everything computed from it that does not change between the steps of one sample."""

    conditioning: Conditioning
    cache: Any  # the backbone's own: text keys and values, projections


class Backbone(Protocol):
    """The denoising network; a `torch.nn.Module`."""

    accepts: frozenset[str]  # slots of Conditioning

    def prepare(self, conditioning: Conditioning) -> Prepared: ...  # once per sample

    def __call__(self, x: Tensor, t: Tensor, conditioning: Conditioning | Prepared) -> Tensor: ...  # t: (B,) float


@dataclass(frozen=True)
class LatentSpec:
    """The size of a final latent, from which conditioners and wiring add up channels."""

    channels: int
    height: int
    width: int
    downsampling: int


Encode = Callable[[Tensor], Tensor]  # pixels (B, 3, H, W) in [-1, 1] => final latents (posterior mean)


class Conditioner(Protocol):
    """Batch fields to one slot of the conditioning; a `torch.nn.Module`."""

    reads: frozenset[str]  # batch fields
    slot: str  # tokens | spatial | vector
    drop: float  # rate at which training replaces it by `null`, for guidance

    def width(self, latent: LatentSpec) -> int: ...  # D of tokens and vectors, channels of spatial

    def __call__(self, batch: dict[str, Any], encode: Encode) -> Tensor: ...

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor: ...  # "nothing given", same shape


def states_field(name: str) -> str:
    """Batch field with what conditioner `name` said when the latents were encoded: it is not run again."""
    return f"states.{name}"


class Level(NamedTuple):
    """A noise level: x = alpha clean + sigma noise; `time` is what the network is told, None at the end."""

    alpha: float
    sigma: float
    time: float | None


Denoise = Callable[[Tensor, Level], Tensor]  # conditions and guidance bound => clean estimate, x's dtype or float64
AfterStep = Callable[[int, Tensor, Tensor], Tensor]  # (step, x, clean estimate) => x


class Sampler(Protocol):
    """Walks down a grid of noise levels, noisiest first, to the last level of the grid."""

    def __call__(
        self,
        denoise: Denoise,
        x: Tensor,
        grid: list[Level],
        *,
        noise: Callable[[int], Tensor],
        after_step: AfterStep | None = None,
    ) -> Tensor: ...


class Task(Protocol):
    """What is given and what is asked, derived from an image."""

    adds: ClassVar[frozenset[str]]  # batch fields it derives

    @property
    def needs(self) -> frozenset[str]: ...  # stored parts: image (as stored, so latents cannot serve) | mask | ...

    @property
    def held_out(self) -> "Task": ...  # the same for images that are compared

    @property
    def keeps(self) -> Callable[[Mapping[str, Any]], bool] | None: ...  # by KEY.json; None: every image takes part

    def give(self, sample: dict[str, Any], random: Any) -> dict[str, Any]: ...  # per image, in loader workers

    def finish(self, images: Tensor, batch: dict[str, Any]) -> Tensor: ...  # after decoding
