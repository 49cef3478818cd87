"""Positions of patches in two dimensions, and numbers that a network receives beside the time, as it takes them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.nn.blocks import timestep_embedding, zero

_PERIOD = 10_000.0
Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (1, 1, N, d), of angles that repeat in pairs


def sine_cosine(
    rows: int,
    columns: int,
    width: int,
    device: torch.device | None = None,
    *,
    origin: tuple[int, int] = (0, 0),  # number of the first row and column
    scale: float = 1.0,  # place of a number
) -> Tensor:
    """(rows columns, width) float32: the column in the first half of the channels, the row in the second.

    Each half: sines, then cosines, of place 10000^(-i / q), i = 0 .. q - 1, q = width / 4 (DiT, models.py; computed in
    float64).
    """
    rate = _PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    numbers = zip(origin, (rows, columns), strict=True)
    places = (scale * torch.arange(first, first + side, dtype=torch.float64) for first, side in numbers)
    row, column = torch.meshgrid(*places, indexing="ij")
    angles = (place.flatten()[:, None] * rate for place in (column, row))
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float().to(device)


def rotary(rows: int, columns: int, head_width: int, device: torch.device | None = None) -> Rotation:
    """Cosines and sines for heads of `head_width`: the row turns the first half of a head, the column the second.

    Angles are place 10000^(-i / q), i = 0 .. q - 1, q = head_width / 4, each for two neighbouring channels
    (LightningDiT's rotary embedding, after Su et al. 2021).
    """
    rate = _PERIOD ** -(torch.arange(head_width // 4, dtype=torch.float32) / (head_width // 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = torch.cat([place.flatten()[:, None] * rate for place in (row, column)], dim=1)
    angles = angles.repeat_interleave(2, dim=1)[None, None].to(device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x (B, H, N, d) with every pair of neighbouring channels (a, b) => (a cos - b sin, b cos + a sin)."""
    cosine, sine = (part.to(x.dtype) for part in rotation)
    a, b = x.unflatten(3, (-1, 2)).unbind(4)
    return x * cosine + torch.stack([-b, a], dim=4).flatten(3) * sine


_NUMBER_CHANNELS = 256


class NumberEmbedding(nn.Module):
    """(B, n) numbers in the units of the time => (B, width), added to the embedding of the time.

    Sinusoids of each, linear, SiLU, linear; the last layer is zero at the start, so that a network which gets them
    begins as the one without (as `time_cond_proj` of Luo et al. 2023, "Latent consistency models").
    """

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(numbers * _NUMBER_CHANNELS, width)
        self.mix = zero(nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        waves = [timestep_embedding(part, _NUMBER_CHANNELS, like=self.expand.weight) for part in numbers.unbind(1)]
        return self.mix(F.silu(self.expand(torch.cat(waves, dim=1))))


def number_embedding(numbers: int, width: int) -> NumberEmbedding | None:
    """None for a network without them."""
    return NumberEmbedding(numbers, width) if numbers else None
