"""Raw latents, which a first stage gives, to final ones, on which diffusion works, and back: one object for both."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.errors import InputError


class LatentScale(nn.Module):
    """final = (raw - shift) / std, one number or one per channel; both are saved with the model."""

    std: Tensor
    shift: Tensor

    def __init__(self, std: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        std_table, shift_table = (torch.atleast_1d(torch.as_tensor(v, dtype=torch.float32)) for v in (std, shift))
        if not bool((torch.isfinite(std_table) & (std_table > 0)).all()):
            raise InputError(f"the latent scale std={std} is not above zero; encode the images again to measure it.")
        self.register_buffer("std", std_table)  # (1,) or (C,)
        self.register_buffer("shift", shift_table)  # (1,) or (C,)

    @classmethod
    def fixed(cls, factor: float) -> "LatentScale":
        """The official `scale_factor`, by which raw latents are multiplied (0.18215, 1.0)."""
        return cls(1.0 / factor)

    @classmethod
    def measured(cls, statistics: Mapping[str, Any], per_channel: bool = False) -> "LatentScale":
        """From a latent manifest's statistics: one number as in the paper, or one per channel."""
        if per_channel:
            return cls(statistics["std"], statistics["mean"])
        return cls(statistics["overall_std"])

    def normalise(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) => final latents, float32."""
        return (raw.float() - self.shift.float()[:, None, None]) / self.std.float()[:, None, None]

    def denormalise(self, final: Tensor) -> Tensor:
        """Final latents (B, C, h, w) => raw latents, float32."""
        return final.float() * self.std.float()[:, None, None] + self.shift.float()[:, None, None]
