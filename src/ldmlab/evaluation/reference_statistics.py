"""Features of a reference set, kept between evaluations under the hash of everything that decides them.

One file DIGEST.safetensors: index (N,) and features (N, D) of every picture, or for large sets count (), sum (D,) and
outer (D, D) in float64 alone, which the Frechet distance needs. The header says whose they are, so a file can be
copied to other machines; one that says something else than its name promises is refused.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldmlab.checkpoints import write_atomically
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.record import gathered
from ldmlab.evaluation.score import EvaluationPass, Numbered
from ldmlab.fetched import weights_folder
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.frechet import FrechetDistance

FORMAT_VERSION = 1
LARGEST_SET = 60_000  # pictures whose features are kept whole: 0.5 GB at 2048 floats; above it only sums are
_CHUNK = 4096  # rows given to the scores at once
_KNOWN = frozenset({"features", "real", "index"})  # what a kept row can tell a score


def statistics_folder() -> Path:
    """LDMLAB_REFERENCES, or `reference` beside fetched weights."""
    return Path(os.environ.get("LDMLAB_REFERENCES") or weights_folder() / "reference")


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that decides the features of a reference set."""

    manifest_hash: str
    transform: str  # of the shards, as JSON
    image_size: int  # px
    task: str  # what a task cuts out of each picture; "" without one
    limit: int | None
    features: str
    weights_hash: str

    @classmethod
    def of(cls, data: ShardData, split: str, limit: int | None, extractor: FeatureExtractor) -> "ReferenceKey":
        """For a split seen through an extractor."""
        manifest = data.manifest(split, "images")
        return cls(
            manifest_hash=manifest.hash,
            transform=json.dumps(manifest.transform, sort_keys=True),
            image_size=data.image_size,
            task="" if data.task is None else f"{data.task.held_out!r}, seed {data.seed}",
            limit=None if limit is None or limit >= manifest.total else limit,
            features=extractor.name,
            weights_hash=extractor.weights_hash,
        )

    @property
    def digest(self) -> str:
        """Name of the file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def load(folder: Path, key: ReferenceKey) -> dict[str, Tensor] | None:
    """The tensors kept for a set; None where there are none yet."""
    path = folder / f"{key.digest}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("reference", "{}"))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"reference statistics {path} cannot be read ({error}); delete the file.") from None
    told, expected = header.get("key", {}), asdict(key)
    if header.get("format_version") != FORMAT_VERSION or told != expected:
        wrong = [name for name, value in expected.items() if told.get(name) != value] or ["format_version"]
        raise InputError(
            f"reference statistics {path} are of another set ({', '.join(wrong)} differ); delete the file."
        )
    return stored


class Recorder:
    """Collects the features of this process's share; beyond LARGEST_SET only their sums, so memory stays bounded."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._sums: FrechetDistance | None = None

    def add(self, features: Tensor, index: Tensor) -> None:
        """Features (B, D) with their numbers (B,)."""
        self._rows.append(features.float().cpu())
        self._numbers.append(index.cpu())
        if self._sums is not None or sum(map(len, self._rows)) > LARGEST_SET:
            self._fold()

    def _fold(self) -> None:
        for rows in self._rows:
            self._sums = self._sums or FrechetDistance(rows.shape[1])
            self._sums.update(rows, real=True)
        self._rows, self._numbers = [], []

    def tensors(self) -> dict[str, Tensor]:
        """Of all processes together, what a file holds; empty if there was no picture."""
        counts = gathered((sum(map(len, self._rows)), self._sums is not None))
        if any(folded for _, folded in counts) or sum(count for count, _ in counts) > LARGEST_SET:
            self._fold()
            shares = [share for share in gathered(_sums(self._sums)) if share]
            return {name: sum(share[name] for share in shares[1:]) + shares[0][name] for name in shares[0]}
        mine = (torch.cat(self._rows), torch.cat(self._numbers)) if self._rows else None
        found = [share for share in gathered(mine) if share is not None]
        if not found:
            return {}
        features, index = torch.cat([rows for rows, _ in found]), torch.cat([numbers for _, numbers in found])
        order = index.argsort(stable=True)
        return {"features": features[order].contiguous(), "index": index[order].contiguous()}


def _sums(metric: FrechetDistance | None) -> dict[str, Tensor]:
    if metric is None:
        return {}
    return {"count": metric.real_count, "sum": metric.real_sum, "outer": metric.real_outer}


def store(folder: Path, key: ReferenceKey, tensors: dict[str, Tensor]) -> Path:
    """Written whole or not at all."""
    path = folder / f"{key.digest}.safetensors"
    metadata = {"reference": json.dumps({"format_version": FORMAT_VERSION, "key": asdict(key)})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def see_reference(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,  # of kept statistics; None: look at the pictures
    pictures: Callable[[], Iterable[Numbered]],  # this process's share
    rank: int = 0,
    world: int = 1,
) -> bool:
    """Show the scores the real pictures, from kept features where they suffice; True if they did.

    All processes take the same way: the first one decides.
    """
    folder = None if " at 0x" in key.task else folder  # a task that does not say what it does
    stored = None if folder is None or not _told_by_features(seen) else load(folder, key)
    if not gathered(stored is not None and _suffices(stored, seen))[0]:
        _look(seen, key, folder, pictures, rank)
        return False
    if stored is None:
        raise InputError(f"reference statistics in {folder} are seen by the first process alone; share the folder.")
    if "features" in stored:
        _feed(seen, stored, rank, world)
    elif rank == 0:
        _feed_sums(seen, stored)
    return True


def _look(
    seen: EvaluationPass, key: ReferenceKey, folder: Path | None, pictures: Callable[[], Iterable[Numbered]], rank: int
) -> None:
    """Through the extractor, and keep what it says."""
    recorder = Recorder()
    for index, batch in pictures():
        features = seen.add(batch, True, index)
        if folder is not None:
            recorder.add(features, index)
    if folder is not None:
        tensors = recorder.tensors()
        if rank == 0 and tensors:
            store(folder, key, tensors)
        gathered(rank)  # nobody asks for the file before it is there


def against_other_split(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,
    pictures: Callable[[], Iterable[Numbered]],
    rank: int = 0,
    world: int = 1,
) -> EvaluationPass:
    """A second Frechet distance of the same samples: from here on they are shown to it too."""
    other = EvaluationPass(seen.extractor, {"fid": FrechetDistance(seen.extractor.width, small_sample=True)})
    see_reference(other, key, folder, pictures, rank, world)
    seen.also.append(other)
    return other


def _told_by_features(seen: EvaluationPass) -> bool:
    """Whether no score looks at anything of a real picture but its features."""
    return all(_needs(metric) <= _KNOWN for metric in seen.metrics.values())


def _needs(metric: Any) -> frozenset[str]:
    """What a score must be told of a real picture."""
    told = inspect.signature(metric.update).parameters
    needed = {name for name, parameter in told.items() if parameter.default is parameter.empty}
    return frozenset(needed - {"logits"})  # of generated pictures alone


def _suffices(stored: dict[str, Tensor], seen: EvaluationPass) -> bool:
    of_sums = all(isinstance(m, FrechetDistance) or "logits" in _parameters(m) for m in seen.metrics.values())
    return "features" in stored or (of_sums and not seen.keeps)


def _parameters(metric: Any) -> Iterable[str]:
    return inspect.signature(metric.update).parameters


def _feed(seen: EvaluationPass, stored: dict[str, Tensor], rank: int, world: int) -> None:
    mine = slice(rank, None, world)
    features, index = stored["features"][mine], stored["index"][mine]
    for start in range(0, len(index), _CHUNK):
        seen.add_features(features[start : start + _CHUNK], True, index[start : start + _CHUNK])


def _feed_sums(seen: EvaluationPass, stored: dict[str, Tensor]) -> None:
    for metric in seen.metrics.values():
        if isinstance(metric, FrechetDistance):
            metric.real_count += stored["count"].to(metric.real_count.device)
            metric.real_sum += stored["sum"].to(metric.real_sum.device)
            metric.real_outer += stored["outer"].to(metric.real_outer.device)
    seen.counts[True] += int(stored["count"])
