"""Conditioners: fields of a batch to tokens, spatial channels or a vector."""

from typing import Any

import torch
from torch import Tensor, nn

from ldmlab.contracts import Encode, LatentSpec
from ldmlab.errors import InputError, check_fraction


def check_classes(field: str, numbers: Tensor, option: str, classes: int) -> None:
    """InputError for numbers outside 0 .. classes - 1; not on a GPU, since reading them would wait for it."""
    on_cpu = type(numbers) is Tensor and numbers.device.type == "cpu"
    if on_cpu and numbers.numel() and not 0 <= int(numbers.min()) <= int(numbers.max()) < classes:
        raise InputError(
            f"{field} {int(numbers.min())} .. {int(numbers.max())} does not fit {option}={classes}; "
            "set the number of classes of the data, numbered from 0."
        )


class BaseConditioner(nn.Module):
    """The frame of the conditioners here: a width, a checked rate, and zeros as the null condition."""

    reads: frozenset[str]
    slot: str

    def __init__(self, drop: float, width: int = 0) -> None:  # 0: it depends on the latent, so `width` is overridden
        super().__init__()
        check_fraction("conditioner.drop", drop)
        self.drop, self._width = drop, width

    def width(self, latent: LatentSpec) -> int:
        """D of tokens and vectors, channels of spatial."""
        return self._width

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The value without this condition, of the same shape."""
        return torch.zeros_like(self(batch, encode))
