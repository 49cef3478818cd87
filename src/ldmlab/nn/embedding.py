"""The noise level as a vector."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000.0, shift: int = 0) -> Tensor:
    """(B,) times => (B, width) float32: cosines first, then sines, of t max_period^(-i / (half - shift))."""
    half = width // 2
    rate = -math.log(max_period) / (half - shift)
    frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * rate)
    angle = t.float()[:, None] * frequency[None, :]
    embedding = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
    return F.pad(embedding, (0, 1)) if width % 2 else embedding


class TimeMLP(nn.Module):
    """(B,) times => (B, 4 channels): sinusoids, linear, SiLU, linear."""

    def __init__(self, channels: int, shift: int = 0) -> None:
        super().__init__()
        self.channels, self.shift = channels, shift
        self.width = 4 * channels
        self.expand = nn.Linear(channels, self.width)
        self.mix = nn.Linear(self.width, self.width)

    def forward(self, t: Tensor) -> Tensor:
        embedding = timestep_embedding(t, self.channels, shift=self.shift).to(self.expand.weight.dtype)
        return self.mix(F.silu(self.expand(embedding)))
