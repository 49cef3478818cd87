"""Cache of the features of a reference set; the key is a hash of everything that determines them.

One file DIGEST.safetensors: index (N,) and features (N, D) of all images, with other outputs that scores used (spatial,
clip), or for large sets count (), sum (D,), outer (D, D) in float64 alone, for the Frechet distance. The header
holds the key, so a file can be copied to other machines; one whose header does not match its name is refused.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldmlab import distributed
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.scoring import EvaluationPass, Numbered
from ldmlab.files import weights_folder, write_atomically
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.frechet import FrechetDistance, whole

FORMAT_VERSION = 1
LARGEST_SET = 60_000  # most images whose features are cached: 0.5 GB at 2048 floats; above it only sums are
_CHUNK = 4096  # rows given to the scores at once
_KEPT = ("features", "spatial", "clip")  # outputs of an extractor that can be kept
_STORABLE = frozenset({*_KEPT, "real", "index"})  # arguments of a score that a kept row serves


def statistics_folder() -> Path:
    """LDMLAB_REFERENCES, or `reference` in the folder of fetched weights."""
    return Path(os.environ.get("LDMLAB_REFERENCES") or weights_folder() / "reference")


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that determines the features of a reference set."""

    manifest_hash: str
    transform: str  # of the shards, as JSON
    image_size: int  # px
    task: str  # what a task cuts out of each image; "" without one
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
            weights_hash="+".join([extractor.weights_hash, *_second(extractor)]),
        )

    @property
    def digest(self) -> str:
        """Name of the file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


def _second(extractor: FeatureExtractor) -> list[str]:
    """The weights of the CLIP model that is used besides the feature network, if there is one."""
    return [extractor.text_weights_hash] if hasattr(extractor, "text_weights_hash") else []


def load(folder: Path, key: ReferenceKey) -> dict[str, Tensor] | None:
    """The cached tensors of a set; None where there are none yet."""
    path = folder / f"{key.digest}.safetensors"
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("reference", "{}"))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"reference statistics {path} cannot be read ({error}); delete the file.") from None
    found, expected = header.get("key", {}), asdict(key)
    if header.get("format_version") != FORMAT_VERSION or found != expected:
        wrong = [name for name, value in expected.items() if found.get(name) != value] or ["format_version"]
        raise InputError(
            f"reference statistics {path} are of another set ({', '.join(wrong)} differ); delete the file."
        )
    return stored


def store(folder: Path, key: ReferenceKey, tensors: dict[str, Tensor]) -> Path:
    """Written whole or not at all."""
    path = folder / f"{key.digest}.safetensors"
    metadata = {"reference": json.dumps({"format_version": FORMAT_VERSION, "key": asdict(key)})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def see_reference(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,  # of kept statistics; None: the images are read
    images: Callable[[], Iterable[Numbered]],  # this process's share
    total: int,  # images of the set; features of fewer are neither kept nor used
) -> bool:
    """Update the metrics with the real images, from cached features if they suffice; True if they did.

    All processes take the same way: the first one decides.
    """
    folder = None if " at 0x" in key.task else folder  # a task whose representation does not identify it
    stored = None if folder is None or not _by_features(seen) else load(folder, key)
    if not distributed.from_first(stored is not None and _suffices(stored, seen) and _count(stored) == total):
        _read(seen, key, folder, images, total, kept_already=stored or {})
        return False
    if stored is None:
        raise InputError(f"reference statistics in {folder} are seen by the first process alone; share the folder.")
    if "features" in stored:
        _feed(seen, stored)
    elif distributed.rank() == 0:
        _feed_sums(seen, stored)
    return True


def _count(stored: Mapping[str, Tensor]) -> int:
    """Images behind kept statistics."""
    return len(stored["index"]) if "index" in stored else int(stored["count"])


def _read(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,
    images: Callable[[], Iterable[Numbered]],
    total: int,
    kept_already: Iterable[str],  # is kept again in the new file
) -> None:
    """Through the extractor; the output is kept, unless images are missing."""
    names = distributed.from_first([name for name in _KEPT if name in {*_used(seen), *kept_already}])
    recorder = Recorder(names)
    for index, batch in images():
        found = seen.add(batch, True, index)
        if folder is not None:
            recorder.add(found, index)
    if folder is not None:
        tensors = recorder.tensors()
        if distributed.rank() == 0 and tensors and _count(tensors) == total:
            store(folder, key, tensors)
        distributed.barrier()  # no process reads the file before it is there


def against_other_split(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,
    images: Callable[[], Iterable[Numbered]],
    total: int,
) -> EvaluationPass:
    """A second Frechet distance of the same samples: from here on they update it too."""
    other = EvaluationPass(seen.extractor, {"fid": FrechetDistance(seen.extractor.width, small_sample=True)})
    see_reference(other, key, folder, images, total)
    seen.also.append(other)
    return other


def _by_features(seen: EvaluationPass) -> bool:
    """Whether all inputs that the scores take from real images can be cached."""
    return all(_needs(metric) <= _STORABLE for metric in seen.metrics.values())


def _used(seen: EvaluationPass) -> list[str]:
    """The features, and other cached outputs that the scores take."""
    needed = frozenset().union(*(_needs(metric) for metric in seen.metrics.values()))
    return [name for name in _KEPT if name == "features" or name in needed & seen.extractor.gives]


def _needs(metric: Any) -> frozenset[str]:
    """Inputs that a score needs from a real image."""
    parameters = inspect.signature(metric.update).parameters
    needed = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    return frozenset(needed - {"logits"})  # of generated images alone


def _suffices(stored: dict[str, Tensor], seen: EvaluationPass) -> bool:
    if "features" in stored:
        return stored.keys() >= set(_used(seen))
    of_sums = all(
        (isinstance(m, FrechetDistance) and "features" in _needs(m)) or "logits" in _parameters(m)
        for m in seen.metrics.values()
    )
    return of_sums and not seen.keeps


def _parameters(metric: Any) -> Iterable[str]:
    return inspect.signature(metric.update).parameters


def _feed(seen: EvaluationPass, stored: dict[str, Tensor]) -> None:
    mine = {name: tensor[distributed.rank() :: distributed.world_size()] for name, tensor in stored.items()}
    index = mine.pop("index")
    for start in range(0, len(index), _CHUNK):
        rows = slice(start, start + _CHUNK)
        seen.add_features({name: tensor[rows] for name, tensor in mine.items()}, True, index[rows])


def _feed_sums(seen: EvaluationPass, stored: dict[str, Tensor]) -> None:
    for metric in seen.metrics.values():
        if isinstance(metric, FrechetDistance):
            metric.real_count += stored["count"].to(metric.real_count.device)
            metric.real_sum += stored["sum"].to(metric.real_sum.device)
            metric.real_outer += stored["outer"].to(metric.real_outer.device)
    seen.counts[True] += int(stored["count"])


class Recorder:
    """Features of this process's share; beyond LARGEST_SET images only their sums, so memory is bounded."""

    def __init__(self, names: Iterable[str] = ("features",)) -> None:
        self.names = tuple(names)  # of what is kept of every image
        self._rows: list[dict[str, Tensor]] = []
        self._numbers: list[Tensor] = []
        self._sums: FrechetDistance | None = None

    def add(self, found: Mapping[str, Tensor], index: Tensor) -> None:
        """Tensors (B, D) by name with the images' numbers (B,)."""
        self._rows.append({name: found[name].float().cpu() for name in self.names})
        self._numbers.append(index.cpu())
        if self._sums is not None or sum(map(len, self._numbers)) > LARGEST_SET:
            self._fold()

    def _fold(self) -> None:
        for rows in self._rows:
            self._sums = self._sums or FrechetDistance(rows["features"].shape[1])
            self._sums.update(rows["features"], real=True)
        self._rows, self._numbers = [], []

    def tensors(self) -> dict[str, Tensor]:
        """Of all processes together, what a file holds; empty if there was no image."""
        counts = distributed.gather((sum(map(len, self._numbers)), self._sums is not None))
        if any(folded for _, folded in counts) or sum(count for count, _ in counts) > LARGEST_SET:
            self._fold()
            shares = [share for share in distributed.gather(_sums(self._sums)) if share]
            return {name: sum(share[name] for share in shares[1:]) + shares[0][name] for name in shares[0]}
        mine = {name: torch.cat([rows[name] for rows in self._rows]) for name in self.names} if self._rows else {}
        found = [
            share for share in distributed.gather(mine | {"index": torch.cat(self._numbers)} if mine else {}) if share
        ]
        if not found:
            return {}
        together = {name: torch.cat([share[name] for share in found]) for name in found[0]}
        order = together["index"].argsort(stable=True)
        return {name: tensor[order].contiguous() for name, tensor in together.items()}


def _sums(metric: FrechetDistance | None) -> dict[str, Tensor]:
    if metric is None:
        return {}
    return {"count": metric.real_count, "sum": metric.real_sum, "outer": whole(metric.real_outer)}
