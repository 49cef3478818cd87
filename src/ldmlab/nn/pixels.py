"""Pixels as bytes in files and loaders, as numbers in [-1, 1] in networks."""

import torch
from torch import Tensor


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0 .. 255 => float32 in [-1, 1], any shape: x / 127.5 - 1."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_bytes(pixels: Tensor) -> Tensor:
    """Numbers in [-1, 1], values outside are clamped => uint8, rounded to the nearest: (x + 1) 127.5."""
    return pixels.detach().float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
