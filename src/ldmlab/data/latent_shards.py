"""Latent shards: the moments a first stage gives for every image, and the statistics of their latents.

KEY.npy holds moments (views, 2C or C, h, w): mean and, where there is one, log-variance; view 0 is the image, view 1
its mirror image where that was encoded. Never a sample of the posterior, never multiplied by a constant.

States of frozen encoders are stored with the moments: KEY.NAME.states.npy, float16, (views, L, D). NAME is the
conditioner's; views is 1 where the encoder reads no image (captions), else that of the moments. The features of an
encoder that training aligns with are stored alike: KEY.encoder.NAME.states.npy, (views, D, h, w).
"""

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldmlab.data.decode import states_ending
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.tars import Files
from ldmlab.errors import InputError
from ldmlab.stored_names import maker_of

LOGVAR_RANGE = (-30.0, 20.0)  # as contracts.Posterior clamps it
DTYPE = "float16"  # of stored states
EncodeStates = Callable[[Tensor, Mapping[str, list[Any]]], dict[str, NDArray[np.float32]]]
# uint8 (B, 3, H, W) and the fields of the samples => by conditioner (B, views, L, D), by encoder (B, views, D, h, w)


@dataclass
class Statistics:
    """Sums over samples of the posterior, per channel, in float64; two of them add up.

    E[z] = E[mean],  E[z^2] = E[mean^2] + E[exp(logvar)].
    """

    images: int = 0
    values: int = 0  # per channel
    first: list[float] = field(default_factory=list)  # sum of z, (C,)
    second: list[float] = field(default_factory=list)  # sum of z^2, (C,)

    def add_moments(self, moments: NDArray[np.float32], channels: int) -> None:
        """Moments (views, 2C or C, h, w) of one image."""
        mean = moments[:, :channels].astype(np.float64)
        square = mean**2
        if moments.shape[1] > channels:
            square += np.exp(np.clip(moments[:, channels:].astype(np.float64), *LOGVAR_RANGE))
        axes = (0, 2, 3)
        self.add(Statistics(1, mean[:, 0].size, mean.sum(axes).tolist(), square.sum(axes).tolist()))

    def add(self, other: "Statistics") -> None:
        if not self.values:
            self.first, self.second = [0.0] * len(other.first), [0.0] * len(other.second)
        if other.values:
            self.first = [a + b for a, b in zip(self.first, other.first, strict=True)]
            self.second = [a + b for a, b in zip(self.second, other.second, strict=True)]
        self.images, self.values = self.images + other.images, self.values + other.values

    def summary(self) -> dict[str, Any]:
        """Mean and standard deviation per channel, and of all values together (the paper's one number)."""
        mean = [a / self.values for a in self.first]
        second = [b / self.values for b in self.second]
        overall = sum(mean) / len(mean)
        return {
            "images": self.images,
            "mean": mean,
            "std": [math.sqrt(max(b - m * m, 0.0)) for m, b in zip(mean, second, strict=True)],
            "overall_mean": overall,
            "overall_std": math.sqrt(max(sum(second) / len(second) - overall**2, 0.0)),
        }


@dataclass
class FinishedShard:
    """Description of a complete latent shard, kept in a side file until the manifest is written."""

    info: ShardInfo | None  # None: no image of it could be read
    statistics: Statistics
    moment_channels: int  # 2C with a log-variance, C without
    skipped: list[str]


def npy_bytes(what: str, values: NDArray[np.float32], dtype: str, instead: str) -> bytes:
    """A .npy of the values as `dtype`; InputError where one does not fit it or is not finite."""
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not np.isfinite(stored).all():
        raise InputError(f"encode: the {what} do not fit {dtype} (largest {np.abs(values).max():g}); {instead}.")
    file = io.BytesIO()
    np.save(file, stored, allow_pickle=False)
    return file.getvalue()


def state_files(key: str, states: Mapping[str, NDArray[np.float32]]) -> Files:
    """The files of one sample from its states (views, L, D)."""
    files = {}
    for name, values in states.items():
        instead = f"leave {maker_of(name)} out, so that it runs while training"
        files[states_ending(name)] = npy_bytes(f"states of {maker_of(name)} for {key}", values, DTYPE, instead)
    return files
