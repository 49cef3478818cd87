"""What every result writes down of itself: the pictures it compared with, the features it looked through, its place
in the paper's table."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ldmlab.data.shard_data import ShardData
from ldmlab.evaluation.paper_table import Measured, place
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.score import Score
from ldmlab.metrics.features import FeatureExtractor

FORMAT_VERSION = 1
T = TypeVar("T")


def reference_record(data: ShardData, split: str, pictures: int) -> dict[str, Any]:
    """The real pictures of a result, told apart from all others by the hash of their manifest."""
    manifest = data.manifest(split, "images")
    return {
        "folder": str(data.folder(split, "images")),
        "split": split,
        "pictures": pictures,
        "manifest_hash": manifest.hash,
        "transform": manifest.transform,
        "image_size": data.image_size,
        "source": manifest.source,
    }


def features_record(extractor: FeatureExtractor) -> dict[str, Any]:
    """The network whose features were compared."""
    return {"name": extractor.name, "weights_hash": extractor.weights_hash, "width": extractor.width}


def paper_record(
    protocol: Protocol,
    data: ShardData,
    extractor: FeatureExtractor,
    path: str,  # of the model
    scores: Mapping[str, Score],
    counts: tuple[int, int],  # real and generated pictures
) -> dict[str, Any] | None:
    """The paper's table with our row, and what keeps it from being compared; None for a protocol without a table."""
    if protocol.paper_table is None:
        return None
    measured = Measured(
        method=Path(path).name,
        values={name: score.value for name, score in scores.items()},
        dataset=protocol.dataset,
        picture_size=data.image_size,
        samples=counts[1],
        features=extractor.name,
        reference_split=protocol.reference,
        reference_pictures=counts[0],
        reference_rule=data.manifest(protocol.reference, "images").transform.get("rule"),
    )
    table = place(protocol.paper_table, measured)
    return asdict(table) | {"comparable": table.comparable}


def gathered(mine: T) -> list[T]:
    """The value of every process, in their order."""
    if not dist.is_initialized():
        return [mine]
    everyone: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def all_items(mine: Iterable[T]) -> list[T]:
    """The items of all processes in one list."""
    return list(chain.from_iterable(gathered(list(mine))))
