"""Latent shards: the moments a first stage gives for every image, and the statistics of their latents.

KEY.npy holds moments (views, 2C or C, h, w): mean and, where there is one, log-variance; view 0 is the image, view 1
its mirror image where that was encoded. Never a sample of the posterior, never multiplied by a constant.

States of frozen encoders are stored with the moments: KEY.NAME.states.npy, float16, (views, L, D). NAME is the
conditioner's; views is 1 where the encoder reads no image (captions), else that of the moments.
"""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ldmlab.data.decode import stored_view
from ldmlab.data.manifest import MANIFEST, Manifest, ShardInfo, read_manifest
from ldmlab.data.output_folder import ShardFile
from ldmlab.data.shards import Files, tar_bytes
from ldmlab.errors import InputError
from ldmlab.files import read_json, write_json

ENCODE_PLAN = "encode.json"  # next to latent shards: the settings of the encoding
LOGVAR_RANGE = (-30.0, 20.0)  # as contracts.Posterior clamps it


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
        """The statistics of both."""
        self.images += other.images
        self.values += other.values
        self.first = _sum(self.first, other.first)
        self.second = _sum(self.second, other.second)

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


def _sum(left: list[float], right: list[float]) -> list[float]:
    """Element by element; an empty list is a sum over nothing."""
    return [a + b for a, b in zip(left, right, strict=True)] if left and right else left or right


@dataclass
class FinishedShard:
    """Description of a complete latent shard, kept in a side file until the manifest is written."""

    info: ShardInfo | None  # None: no image of it could be read
    statistics: Statistics
    moment_channels: int  # 2C with a log-variance, C without
    skipped: list[str]

    def save(self, path: Path) -> None:
        """Written last, so that a shard with this file is complete."""
        write_json(path, asdict(self))

    @staticmethod
    def load(path: Path) -> "FinishedShard | None":
        """None where the shard is not finished."""
        try:
            content = read_json(path)
            info = ShardInfo(**content["info"]) if content["info"] else None
            sums = Statistics(**content["statistics"])
            return FinishedShard(info, sums, content["moment_channels"], content["skipped"])
        except (KeyError, TypeError):
            return None


class LatentShardWriter:
    """One latent shard, under a temporary name until it is complete."""

    def __init__(self, path: Path, channels: int, dtype: str, writer: str = "") -> None:
        self._channels, self._dtype = channels, np.dtype(dtype)
        self._file = ShardFile(path, writer)
        self.statistics, self._moment_channels = Statistics(), 0

    def write(self, key: str, moments: NDArray[np.float32], travelling: Files) -> None:
        """One image: moments (views, 2C or C, h, w) and the files that travel along."""
        with np.errstate(over="ignore"):
            stored = moments.astype(self._dtype)
        if not np.isfinite(stored).all():
            raise InputError(
                f"encode: the moments of {key} do not fit {self._dtype} (largest {np.abs(moments).max():g}); "
                "use dtype=float32, or a first stage with finite latents."
            )
        self.statistics.add_moments(moments, self._channels)
        self._moment_channels = moments.shape[1]
        npy = io.BytesIO()
        np.save(npy, stored, allow_pickle=False)
        files = {**travelling, "npy": npy.getvalue()}
        self._file.append(b"".join(tar_bytes(f"{key}.{ending}", files[ending]) for ending in sorted(files)))

    def finish(self, skipped: Sequence[str]) -> FinishedShard:
        """The shard under its own name."""
        return FinishedShard(self._file.finish(), self.statistics, self._moment_channels, list(skipped))

    def abandon(self) -> None:
        """Leave nothing of an unfinished shard."""
        self._file.abandon()


def read_shard_manifest(folder: Path | str, option: str = "data") -> Manifest:
    """The manifest of image or latent shards; an interrupted encode is named as such."""
    if (Path(folder) / ENCODE_PLAN).exists() and not (Path(folder) / MANIFEST).exists():
        raise InputError(f"{option}={folder} is an unfinished encode; run the same `ldmlab encode` again to finish it.")
    return read_manifest(folder, option)


def moment_shape(latents: Mapping[str, Any] | None) -> tuple[int, int, int]:
    """Shape of the moments of one view, (2C or C, h, w), by the manifest of their shards."""
    found = latents or {}
    channels = found["latent_channels"] * (2 if found["has_logvar"] else 1)
    side = found["image_size"] // found["downsampling"]
    return channels, side, side


def check_fingerprint(folder: Path | str, manifest: Manifest, fingerprint: str) -> None:
    """Refuse latents of another first stage."""
    made_by = (manifest.latents or {}).get("fingerprint")
    if made_by != fingerprint:
        raise InputError(
            f"data.latents={folder} holds latents of another first stage ({str(made_by)[:12]}, this run has "
            f"{fingerprint[:12]}); encode again with `ldmlab encode`, or give the first stage they were made with."
        )


DTYPE = "float16"
EncodeStates = Callable[[Tensor, Mapping[str, list[Any]]], dict[str, NDArray[np.float32]]]
# uint8 (B, 3, H, W) and the fields of the samples => by conditioner (B, views, L, D)


def state_files(key: str, states: Mapping[str, NDArray[np.float32]]) -> Files:
    """The files of one sample from its states (views, L, D)."""
    files = {}
    for name, values in states.items():
        with np.errstate(over="ignore"):
            stored = values.astype(DTYPE)
        if not np.isfinite(stored).all():
            raise InputError(
                f"encode: the states of conditioner.{name} for {key} do not fit {DTYPE} (largest "
                f"{np.abs(values).max():g}); leave conditioner.{name} out, so that it runs while training."
            )
        npy = io.BytesIO()
        np.save(npy, stored, allow_pickle=False)
        files[_ending(name)] = npy.getvalue()
    return files


def decode_states(files: Files, name: str, view: int) -> NDArray[Any]:
    """States of conditioner `name` for one view, float16 (L, D)."""
    states = stored_view(files[_ending(name)], view, axes=3, one_serves=True)
    if not np.isfinite(states).all():
        raise ValueError(f"states of conditioner.{name} that are not finite")
    return states.copy()


def _ending(name: str) -> str:
    return f"{name.lower()}.states.npy"
