"""What a first stage's latents look like to a denoiser: statistics, spectrum, smoothness, equivariance.

Numbers that do not exist, such as the slope of a spectrum without power, are None. Latents: (N, C, h, w).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab.metrics.reconstruction import codebook_use
from ldmlab.nn.pixels import cosine_basis

Number = float | None
NOISE_SCALES = (0.0, 0.1, 0.2, 0.4, 0.8)  # of noise on latents, in deviations of their channel
HIGH_BAND = 0.5  # frequencies above this share of Nyquist's
_LEAST = 1e-10  # squared error of a perfect image: 100 dB, as in ReconstructionMeasures
_EMPTY = 1e-20  # variance or power below which there is none


def channel_statistics(latents: Tensor) -> list[dict[str, Number]]:
    """`mean`, `std` and `kurtosis` (excess: 0 of a Gaussian) of each channel over images and positions."""
    found: list[dict[str, Number]] = []
    for values in latents.double().transpose(0, 1).flatten(1):
        mean, variance = float(values.mean()), float(values.var(correction=0))
        fourth = float((values - mean).pow(4).mean())
        kurtosis = fourth / variance**2 - 3 if variance > _EMPTY else None
        found.append({"mean": mean, "std": math.sqrt(variance), "kurtosis": kurtosis})
    return found


def effective_rank(latents: Tensor) -> float:
    """exp(- sum p log p), p: shares of the eigenvalues of the channels' correlation matrix; C where uncorrelated.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007.
    """
    vectors = standardised(latents).transpose(0, 1).flatten(1)  # (C, N h w)
    values = torch.linalg.eigvalsh(vectors @ vectors.T).clamp_min(0)
    return float(torch.special.entr(values / values.sum().clamp_min(_EMPTY)).sum().exp())


def standardised(latents: Tensor) -> Tensor:
    """Each channel at mean 0 and variance 1, as a denoiser with latent_scale=per_channel sees it; float64."""
    x = latents.double()
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) / variance.clamp_min(_EMPTY).sqrt()


def spectrum(latents: Tensor) -> dict[str, Any]:
    """Power of the standardised channels by frequency, from the orthonormal DCT-II, averaged over images and channels.

    `power`: mean power of the coefficients at radius 1, 2, ... n - 1 of n = the longer side, so 1 of white noise; the
    radius of coefficient (u, v) is n sqrt((u / h)^2 + (v / w)^2), n at Nyquist's frequency along an axis. `slope`: of
    log power over log radius by least squares, 0 of white noise. `high_band`: share of the power, without the mean's,
    above half of Nyquist's frequency, corners included; `white`: the same share of white noise.
    """
    height, width = latents.shape[2:]
    coefficients = cosine_basis(height) @ standardised(latents) @ cosine_basis(width).T
    power = coefficients.square().mean(dim=(0, 1))  # (h, w)
    n = max(height, width)
    radius = n * torch.hypot(torch.arange(height)[:, None] / height, torch.arange(width) / width).double()
    high, ring = radius > HIGH_BAND * n, radius.round().long()
    curve = [float(power[ring == k].mean()) for k in range(1, n)]
    total = float(power.sum() - power[0, 0])
    return {
        "power": curve,
        "slope": _slope(curve),
        "high_band": float(power[high].sum()) / total if total > _EMPTY else None,
        "white": int(high.sum()) / max(height * width - 1, 1),
    }


def _slope(curve: Sequence[float]) -> Number:
    points = [(math.log(k), math.log(power)) for k, power in enumerate(curve, 1) if power > _EMPTY]
    if len(points) < 2:
        return None
    x, y = torch.tensor(points, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * y).sum() / x.square().sum())


def half_size(x: Tensor) -> Tensor:
    """Scaled by 1/2: means of 2 x 2."""
    return F.avg_pool2d(x, 2)


def turned(x: Tensor) -> Tensor:
    """Turned by 90 degrees, counter-clockwise."""
    return torch.rot90(x, 1, (2, 3))


def relative_error(found: Tensor, wanted: Tensor, spread: Tensor | None = None) -> Number:
    """mean (found - wanted)^2 / variance of `spread` (`wanted`) about its channels' means: 0 exact, 1 as the means."""
    variance = float((wanted if spread is None else spread).double().var(dim=(0, 2, 3), correction=0).mean())
    error = float((found.double() - wanted.double()).square().mean())
    return error / variance if variance > _EMPTY else None


def equivariance(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], images: Tensor, latents: Tensor
) -> dict[str, dict[str, Number]]:
    """By transform T (`turned` | `half_size`): errors of `encode`(T x) against T z, of `decode`(T z) against T D(z).

    images (N, 3, H, W) in [-1, 1], latents z = `encode`(images); no `half_size` where a side of z is odd. The decoder's
    is the question of EQ-VAE (Kouzelis et al. 2025, arXiv:2502.09509) and of scale equivariance (Skorokhodov et al.
    2025, arXiv:2502.14831).
    """
    decoded, odd = decode(latents), any(side % 2 for side in latents.shape[2:])
    return {
        transform.__name__: {
            "encoder": relative_error(encode(transform(images)), transform(latents)),
            "decoder": relative_error(decode(transform(latents)), transform(decoded)),
        }
        for transform in ([turned] if odd else [half_size, turned])
    }


def decibels(found: Tensor, wanted: Tensor) -> float:
    """PSNR of images in [-1, 1], clamped, mean over images; 100 dB where they are equal."""
    error = (found.clamp(-1, 1) - wanted).square().mean(dim=(1, 2, 3)) / 4
    return float(-10 * error.clamp_min(_LEAST).log10().mean())


def noise_response(
    decode: Callable[[Tensor], Tensor], images: Tensor, latents: Tensor, noise: Tensor
) -> list[tuple[float, float]]:
    """PSNR of `decode`(z + s noise) against the images, by s in deviations of the channel; s = 0: reconstructions."""
    deviation = latents.std(dim=(0, 2, 3), keepdim=True, correction=0)
    return [(s, decibels(decode(latents + s * deviation * noise), images)) for s in NOISE_SCALES]


def interpolation(
    encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], latents: Tensor
) -> dict[str, Number]:
    """Error of `encode`(`decode`(z)) against z, at latents (`ends`) and half-way between two (`middle`), / Var latents.

    Where the decoder's images half-way are none of the first stage's own, `middle` is far above `ends`.
    """
    middle = (latents + latents.roll(1, 0)) / 2
    return {name: relative_error(encode(decode(z)), z, latents) for name, z in (("ends", latents), ("middle", middle))}


def codebook(codes: Tensor, size: int) -> dict[str, float]:
    """Share of `size` codes that occur in `codes` (...), and bits a code: their entropy, and that of even use."""
    found = codebook_use(torch.bincount(codes.flatten(), minlength=size))
    bits = math.log2(found["codebook_perplexity"])
    return {"size": size, "use": found["codebook_use"], "bits": bits, "most_bits": math.log2(size)}
