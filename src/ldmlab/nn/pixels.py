"""Pixels as bytes in files and loaders, as numbers in [-1, 1] in networks, and frequencies of maps."""

import math

import torch
from torch import Tensor

from ldmlab.errors import InputError


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 => float32 in [-1, 1], any shape: x / 127.5 - 1."""
    return pixels.div(127.5).sub_(1.0)


def to_bytes(pixels: Tensor) -> Tensor:
    """Numbers in [-1, 1], values outside are clamped => uint8, rounded to the nearest: (x + 1) 127.5."""
    return pixels.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def numbers_only(images: Tensor) -> Tensor:
    """The same images (B, ...), or an InputError: as bytes, what is no number would pass for black."""
    bad = int((~torch.isfinite(images)).flatten(1).any(dim=1).sum())
    if bad:
        raise InputError(
            f"{bad} of {len(images)} images from the model hold values that are no numbers (NaN or infinite); its "
            "weights have diverged or its precision is too low: take an earlier checkpoint or precision=float32."
        )
    return images


def as_images(pixels: Tensor) -> Tensor:
    """Pixels (B, 3, H, W) in [-1, 1] => uint8 (B, H, W, 3) on the CPU."""
    return to_bytes(numbers_only(pixels)).permute(0, 2, 3, 1).contiguous().cpu()


def cosine_basis(side: int, device: torch.device | None = None) -> Tensor:
    """The orthonormal cosine transform (DCT-II), (side, side) float64: rows are frequencies."""
    k = torch.arange(side, device=device, dtype=torch.float64)
    basis = torch.cos(math.pi / side * k[:, None] * (k + 0.5)) * math.sqrt(2 / side)
    basis[0] /= math.sqrt(2)
    return basis
