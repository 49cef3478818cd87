"""The reference files hold no weights: every tensor of an official program was drawn from its own name."""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 2e-5  # float32 runs of one network on one machine differ by about 1e-5


def weight_by_rule(key: str, shape: Sequence[int], salt: int = 0) -> Tensor:
    """Matrices of deviation 0.7 / sqrt(fan in), scales near 1, biases near 0."""
    count = math.prod(shape)
    values = np.random.RandomState((zlib.crc32(key.encode()) + salt) % 2**32).standard_normal(count)
    if len(shape) > 1:
        values *= 0.7 / math.sqrt(count // shape[0])
    else:
        values = 1 + 0.1 * values if key.endswith("weight") else 0.1 * values
    return torch.from_numpy(values.reshape(tuple(shape)).astype(np.float32))


def drawn(case: dict[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a recorded case (names, shapes, salt), without a prefix of their names."""
    return {k.removeprefix(prefix): weight_by_rule(k, shape, case["salt"]) for k, shape in case["keys"].items()}


def named_normal(name: str, *shape: int) -> Tensor:
    """A recorded run's draw of this name."""
    values = np.random.RandomState(zlib.crc32(name.encode()) % 2**32).standard_normal(shape)
    return torch.from_numpy(values.astype(np.float32))
