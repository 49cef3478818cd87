"""Features of a reference set, kept between evaluations under the hash of everything that decides them.

One file DIGEST.safetensors: index (N,) and features (N, D) of every image, with what else scores asked for (spatial,
clip), or for large sets count (), sum (D,) and outer (D, D) in float64 alone, which the Frechet distance needs. The
header says whose they are, so a file can be copied to other machines; one that says something else than its name
promises is refused.
"""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldmlab.checkpoints import write_atomically
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.feature_recorder import Recorder
from ldmlab.evaluation.record import gathered
from ldmlab.evaluation.score import EvaluationPass, Numbered
from ldmlab.fetched import weights_folder
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.frechet import FrechetDistance

FORMAT_VERSION = 1
_CHUNK = 4096  # rows given to the scores at once
_KEPT = ("features", "spatial", "clip")  # what an extractor says of an image that can be kept
_TOLD = frozenset({*_KEPT, "real", "index"})  # what a kept row can tell a score


def statistics_folder() -> Path:
    """LDMLAB_REFERENCES, or `reference` beside fetched weights."""
    return Path(os.environ.get("LDMLAB_REFERENCES") or weights_folder() / "reference")


@dataclass(frozen=True)
class ReferenceKey:
    """Everything that decides the features of a reference set."""

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
    """The weights of the CLIP beside the network whose features are compared, if there is one."""
    return [extractor.text_weights_hash] if hasattr(extractor, "text_weights_hash") else []


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


def store(folder: Path, key: ReferenceKey, tensors: dict[str, Tensor]) -> Path:
    """Written whole or not at all."""
    path = folder / f"{key.digest}.safetensors"
    metadata = {"reference": json.dumps({"format_version": FORMAT_VERSION, "key": asdict(key)})}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))
    return path


def see_reference(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,  # of kept statistics; None: look at the images
    images: Callable[[], Iterable[Numbered]],  # this process's share
    rank: int = 0,
    world: int = 1,
) -> bool:
    """Show the scores the real images, from kept features where they suffice; True if they did.

    All processes take the same way: the first one decides.
    """
    folder = None if " at 0x" in key.task else folder  # a task that does not say what it does
    stored = None if folder is None or not _told_by_features(seen) else load(folder, key)
    if not gathered(stored is not None and _suffices(stored, seen))[0]:
        _look(seen, key, folder, images, rank, kept_already=stored or {})
        return False
    if stored is None:
        raise InputError(f"reference statistics in {folder} are seen by the first process alone; share the folder.")
    if "features" in stored:
        _feed(seen, stored, rank, world)
    elif rank == 0:
        _feed_sums(seen, stored)
    return True


def _look(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,
    images: Callable[[], Iterable[Numbered]],
    rank: int,
    kept_already: Iterable[str],  # is kept again in the new file
) -> None:
    """Through the extractor, and keep what it says."""
    names = gathered([name for name in _KEPT if name in {*_asked(seen), *kept_already}])[0]
    recorder = Recorder(names)
    for index, batch in images():
        said = seen.add(batch, True, index)
        if folder is not None:
            recorder.add(said, index)
    if folder is not None:
        tensors = recorder.tensors()
        if rank == 0 and tensors:
            store(folder, key, tensors)
        gathered(rank)  # nobody asks for the file before it is there


def against_other_split(
    seen: EvaluationPass,
    key: ReferenceKey,
    folder: Path | None,
    images: Callable[[], Iterable[Numbered]],
    rank: int = 0,
    world: int = 1,
) -> EvaluationPass:
    """A second Frechet distance of the same samples: from here on they are shown to it too."""
    other = EvaluationPass(seen.extractor, {"fid": FrechetDistance(seen.extractor.width, small_sample=True)})
    see_reference(other, key, folder, images, rank, world)
    seen.also.append(other)
    return other


def _told_by_features(seen: EvaluationPass) -> bool:
    """Whether no score looks at anything of a real image but what can be kept."""
    return all(_needs(metric) <= _TOLD for metric in seen.metrics.values())


def _asked(seen: EvaluationPass) -> list[str]:
    """The features, and what else of that kind the scores look at."""
    needed = frozenset().union(*(_needs(metric) for metric in seen.metrics.values()))
    return [name for name in _KEPT if name == "features" or name in needed & seen.extractor.gives]


def _needs(metric: Any) -> frozenset[str]:
    """What a score must be told of a real image."""
    told = inspect.signature(metric.update).parameters
    needed = {name for name, parameter in told.items() if parameter.default is parameter.empty}
    return frozenset(needed - {"logits"})  # of generated images alone


def _suffices(stored: dict[str, Tensor], seen: EvaluationPass) -> bool:
    if "features" in stored:
        return stored.keys() >= set(_asked(seen))
    of_sums = all(
        (isinstance(m, FrechetDistance) and "features" in _needs(m)) or "logits" in _parameters(m)
        for m in seen.metrics.values()
    )
    return of_sums and not seen.keeps


def _parameters(metric: Any) -> Iterable[str]:
    return inspect.signature(metric.update).parameters


def _feed(seen: EvaluationPass, stored: dict[str, Tensor], rank: int, world: int) -> None:
    mine = {name: tensor[rank::world] for name, tensor in stored.items()}
    index = mine.pop("index")
    for start in range(0, len(index), _CHUNK):
        rows = slice(start, start + _CHUNK)
        seen.add_said({name: tensor[rows] for name, tensor in mine.items()}, True, index[rows])


def _feed_sums(seen: EvaluationPass, stored: dict[str, Tensor]) -> None:
    for metric in seen.metrics.values():
        if isinstance(metric, FrechetDistance):
            metric.real_count += stored["count"].to(metric.real_count.device)
            metric.real_sum += stored["sum"].to(metric.real_sum.device)
            metric.real_outer += stored["outer"].to(metric.real_outer.device)
    seen.counts[True] += int(stored["count"])
