"""Frozen networks that give the features of an image's patches."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.checkpoints import fingerprint


class FrozenEncoder(nn.Module):
    """What every encoder shares: never trained, always in evaluation mode, float32 also under autocast."""

    name: str
    width: int
    node: Mapping[str, Any]  # what rebuilds it, without its weights

    @cached_property
    def weights_hash(self) -> str:
        """Of the weights as they are when it is first asked for."""
        return fingerprint(self.state_dict())

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """It stays in evaluation mode, without gradients for its weights."""
        return super().train(False).requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] => (B, D, h', w') float32."""
        kind = images.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return self.maps(images.float())

    def maps(self, images: Tensor) -> Tensor:
        """`forward` without its surroundings."""
        raise NotImplementedError
