"""One pass over real and generated pictures with one extractor feeds every score."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ldmlab.errors import InputError
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.frechet import SMALL_SAMPLE

Numbered = tuple[Tensor, Tensor]  # index (B,), pictures uint8 (B, 3, H, W)


@dataclass(frozen=True)
class Score:
    """A value with its spread (over splits or subsets; None where the score has none) and what speaks against it."""

    value: float
    spread: float | None
    marks: tuple[str, ...] = ()


class EvaluationPass:
    """Takes pictures in any order and split over processes; keeps features where someone will look at them."""

    def __init__(self, extractor: FeatureExtractor, metrics: Mapping[str, Metric], *, keep: bool = False) -> None:
        for name, metric in metrics.items():
            if "logits" in inspect.signature(metric.update).parameters and not extractor.has_logits:
                raise InputError(
                    f"protocol.metrics.{name} needs logits, which features={extractor.name} does not give; "
                    "choose features=inception or leave that score out."
                )
        self.extractor, self.names = extractor, tuple(metrics)
        self.collection = MetricCollection(dict(metrics)) if metrics else None
        self.features: dict[bool, list[Tensor]] = {True: [], False: []}  # by real
        self.counts = {True: 0, False: 0}
        self._keep = keep

    def add(self, pictures: Tensor, real: bool, index: Tensor) -> None:
        """Pictures uint8 (B, 3, H, W) with their numbers (B,)."""
        seen = self.extractor(pictures)
        self.counts[real] += len(pictures)
        if self.collection is not None:
            self.collection.update(**seen, real=real, index=index)
        if self._keep:
            self.features[real].append(seen["features"].float().cpu())

    def add_all(self, batches: Iterable[Numbered], real: bool, seen: Callable[[int], object] = lambda n: None) -> None:
        """A stream of numbered pictures; `seen` is told how many came."""
        for index, pictures in batches:
            self.add(pictures, real, index)
            seen(len(pictures))

    def compute(self, counts: tuple[int, int] | None = None) -> dict[str, Score]:
        """All scores; with several processes, `counts` are the real and generated pictures of all of them."""
        if self.collection is None:
            return {}
        values = {name: float(value) for name, value in self.collection.compute().items()}
        fewest = min(counts or (self.counts[True], self.counts[False]))
        return {
            name: Score(value, values.get(f"{name}_std"), marks(name, fewest, self.extractor.width))
            for name, value in values.items()
            if not name.endswith("_std")
        }


def marks(name: str, fewest: int, width: int) -> tuple[str, ...]:
    """What a reader must know before comparing the value."""
    if name != "fid":
        return ()
    found = [f"small sample: {fewest} pictures, the distance is biased upwards"] if fewest < SMALL_SAMPLE else []
    return (*found, f"rank deficient: fewer pictures than {width} features") if fewest <= width else tuple(found)


def numbered(batches: Iterable[Mapping[str, Any]]) -> Iterable[Numbered]:
    """Batches of a loader as numbered pictures."""
    for batch in batches:
        if len(batch["key"]):
            yield torch.as_tensor(batch["position"]), batch["image"]
