"""Numbers that a network receives beside the time: the length of a step, a guidance scale."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmlab.nn.blocks import timestep_embedding, zero

_CHANNELS = 256


class NumberEmbedding(nn.Module):
    """(B, n) numbers in the units of the time => (B, width), added to the embedding of the time.

    Sinusoids of each, linear, SiLU, linear; the last layer is zero at the start, so that a network which gets them
    begins as the one without (as `time_cond_proj` of Luo et al. 2023, "Latent consistency models").
    """

    def __init__(self, numbers: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Linear(numbers * _CHANNELS, width)
        self.mix = zero(nn.Linear(width, width))

    def forward(self, numbers: Tensor) -> Tensor:
        waves = [timestep_embedding(part, _CHANNELS, like=self.expand.weight) for part in numbers.unbind(1)]
        return self.mix(F.silu(self.expand(torch.cat(waves, dim=1))))


def number_embedding(numbers: int, width: int) -> NumberEmbedding | None:
    """None for a network without them."""
    return NumberEmbedding(numbers, width) if numbers else None
