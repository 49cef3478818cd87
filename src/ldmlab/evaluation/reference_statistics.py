"""Cache of the features of a reference set; the key is a hash of everything that determines them.

One file DIGEST.safetensors: index (N,) and features (N, D) of all images, with other outputs that scores used (spatial,
clip), or for large sets count (), sum (D,), outer (D, D) in float64 alone, for the Frechet distance. The header
holds the key, so a file can be copied to other machines; one whose header does not match its name is refused.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import Metric

from ldmlab import distributed
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, inputs_of
from ldmlab.files import weights_folder, write_atomically
from ldmlab.metrics.frechet import FrechetDistance, whole

FORMAT_VERSION = 1
LARGEST_SET = 60_000  # most images whose features are cached: 0.5 GB at 2048 floats; above it only sums are
_CHUNK = 4096  # rows given to the scores at once
_KEPT = ("features", "spatial", "clip")  # outputs of an extractor that can be kept
_SUMS = ("count", "sum", "outer")  # of the features, in a `FrechetDistance` with `real_` before
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
        clip = getattr(extractor, "text_weights_hash", None)  # of the CLIP model besides the feature network
        return cls(
            manifest_hash=manifest.hash,
            transform=json.dumps(manifest.transform, sort_keys=True),
            image_size=data.image_size,
            task="" if data.task is None else f"{data.task.held_out!r}, seed {data.seed}",
            limit=None if limit is None or limit >= manifest.total else limit,
            features=extractor.name,
            weights_hash="+".join(one for one in (extractor.weights_hash, clip) if one),
        )

    @property
    def digest(self) -> str:
        """Name of the file."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:32]


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
    storable = all(_needs(metric) <= _STORABLE for metric in seen.metrics.values())
    stored = load(folder, key) if folder is not None and storable else None
    if distributed.from_first(stored is not None and _suffices(stored, seen) and _count(stored) == total):
        if stored is None:
            raise InputError(f"reference statistics in {folder} are seen by the first process alone; share the folder.")
        _feed(seen, stored)
        return True
    kept = {*_used(seen), *(stored or ())}  # what is there already is kept again in the new file
    recorder = Recorder(distributed.from_first([name for name in _KEPT if name in kept]))
    for index, batch in images():
        found = seen.add(batch, True, index)
        if folder is not None:
            recorder.add(found, index)
    if folder is not None:
        tensors = recorder.tensors()
        if distributed.rank() == 0 and tensors and _count(tensors) == total:
            store(folder, key, tensors)
        distributed.barrier()  # no process reads the file before it is there
    return False


def _count(stored: Mapping[str, Tensor]) -> int:
    """Images behind kept statistics."""
    return len(stored["index"]) if "index" in stored else int(stored["count"])


def _used(seen: EvaluationPass) -> list[str]:
    """The features, and other cached outputs that the scores take."""
    needed = frozenset().union(*(_needs(metric) for metric in seen.metrics.values()))
    return [name for name in _KEPT if name == "features" or name in needed & seen.extractor.gives]


def _needs(metric: Metric) -> set[str]:
    """Inputs that a score needs from a real image; logits are of generated images alone."""
    return {name for name, required in inputs_of(metric).items() if required} - {"logits"}


def _suffices(stored: Mapping[str, Tensor], seen: EvaluationPass) -> bool:
    if "features" in stored:
        return stored.keys() >= set(_used(seen))
    of_sums = all(
        (isinstance(m, FrechetDistance) and "features" in _needs(m)) or "logits" in inputs_of(m)
        for m in seen.metrics.values()
    )
    return of_sums and not seen.keeps


def _feed(seen: EvaluationPass, stored: Mapping[str, Tensor]) -> None:
    """This process's share of kept features; of sums, all in the first process."""
    if "features" in stored:
        mine = {name: tensor[distributed.rank() :: distributed.world_size()] for name, tensor in stored.items()}
        index = mine.pop("index")
        for start in range(0, len(index), _CHUNK):
            rows = slice(start, start + _CHUNK)
            seen.add_features({name: tensor[rows] for name, tensor in mine.items()}, True, index[rows])
    elif distributed.rank() == 0:
        for metric in seen.metrics.values():
            if isinstance(metric, FrechetDistance):
                for name in _SUMS:
                    getattr(metric, f"real_{name}").add_(stored[name].to(metric.device))
        seen.counts[True] += _count(stored)


class Recorder:
    """Features of this process's share; beyond LARGEST_SET images only their sums, so memory is bounded."""

    def __init__(self, names: Iterable[str] = ("features",)) -> None:
        self.names = tuple(names)  # of what is kept of every image
        self._rows: list[dict[str, Tensor]] = []
        self._sums: FrechetDistance | None = None

    def add(self, found: Mapping[str, Tensor], index: Tensor) -> None:
        """Tensors (B, D) by name with the images' numbers (B,)."""
        self._rows.append({name: found[name].float().cpu() for name in self.names} | {"index": index.cpu()})
        if self._sums is not None or self._held() > LARGEST_SET:
            self._fold()

    def _held(self) -> int:
        return sum(len(rows["index"]) for rows in self._rows)

    def _fold(self) -> None:
        for rows in self._rows:
            self._sums = self._sums or FrechetDistance(rows["features"].shape[1])
            self._sums.update(rows["features"], real=True)
        self._rows = []

    def tensors(self) -> dict[str, Tensor]:
        """Of all processes together, what a file holds; empty if there was no image."""
        counts = distributed.gather((self._held(), self._sums is not None))
        if any(folded for _, folded in counts) or sum(count for count, _ in counts) > LARGEST_SET:
            self._fold()
            mine = {} if self._sums is None else {name: getattr(self._sums, f"real_{name}") for name in _SUMS}
            shares = [share for share in distributed.gather(mine) if share]
            sums = {name: torch.stack([share[name] for share in shares]).sum(dim=0) for name in _SUMS}
            return sums | {"outer": whole(sums["outer"])}
        together = _joined([share for share in distributed.gather(_joined(self._rows)) if share])
        order = together["index"].argsort(stable=True) if together else None
        return {name: tensor[order].contiguous() for name, tensor in together.items()}


def _joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of all parts by name; empty without a part."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
