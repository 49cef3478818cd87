"""One pass over real and generated pictures with one extractor feeds every score."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ldmlab.errors import InputError
from ldmlab.metrics.features import SPATIAL_WIDTH, FeatureExtractor
from ldmlab.metrics.frechet import SMALL_SAMPLE

_EXTRACTOR_WITH = {  # what an extractor may give besides features => one that does
    "logits": "inception",
    "spatial": "inception",
    "clip": "inception_and_clip",
    "text": "inception_and_clip",
}
Numbered = tuple[Tensor, Tensor]  # index (B,), pictures uint8 (B, 3, H, W)


@dataclass(frozen=True)
class Score:
    """A value with its spread (over splits or subsets; None where the score has none) and what speaks against it."""

    value: float
    spread: float | None
    marks: tuple[str, ...] = ()


class EvaluationPass:
    """Takes pictures in any order and split over processes; keeps features where someone will look at them."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        metrics: Mapping[str, Metric],
        *,
        keep: bool = False,
        captions: Callable[[int], str] | None = None,  # of the generated picture of this number
    ) -> None:
        needs = {name: _needs(metric) for name, metric in metrics.items()}
        for name, needed in needs.items():
            if missing := sorted(needed - extractor.gives):
                raise InputError(
                    f"protocol.metrics.{name} needs {missing[0]}, which features={extractor.name} does not give; "
                    f"choose features={_EXTRACTOR_WITH[missing[0]]} or leave that score out."
                )
            if "text" in needed and captions is None:
                raise InputError(
                    f"protocol.metrics.{name} needs the captions of the samples, and these were drawn without; "
                    "leave that score out."
                )
        self._captions = captions if any("text" in needed for needed in needs.values()) else None
        self.extractor, self.names, self.metrics, self.keeps = extractor, tuple(metrics), dict(metrics), keep
        self.collection = MetricCollection(dict(metrics)) if metrics else None
        self.features: dict[bool, list[Tensor]] = {True: [], False: []}  # by real
        self.counts = {True: 0, False: 0}
        self.also: list[EvaluationPass] = []  # see the same samples beside other real pictures

    def add(self, pictures: Tensor, real: bool, index: Tensor) -> Tensor:
        """Pictures uint8 (B, 3, H, W) with their numbers (B,); their features (B, D)."""
        seen = self.extractor(pictures)
        self._take(seen, real, index)
        return seen["features"]

    def add_features(self, features: Tensor, real: bool, index: Tensor) -> None:
        """Features (B, D) seen before, with the numbers of their pictures (B,)."""
        logits = {"logits": features[:, :0]} if "logits" in self.extractor.gives else {}  # unread of real pictures
        self._take({"features": features, **logits}, real, index)

    def _take(self, seen: Mapping[str, Tensor], real: bool, index: Tensor) -> None:
        self.counts[real] += len(index)
        if self.collection is not None:
            text = {} if real or self._captions is None else {"text": self._texts(index)}
            self.collection.update(**seen, **text, real=real, index=index)
        if self.keeps:
            self.features[real].append(seen["features"].float().cpu())
        for other in () if real else self.also:
            other._take(seen, real, index)

    def _texts(self, index: Tensor) -> Tensor:
        """Embeddings (B, D) of the samples' captions."""
        assert self._captions is not None
        return self.extractor.texts([self._captions(number) for number in index.tolist()])  # type: ignore[attr-defined]

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


def _needs(metric: Metric) -> set[str]:
    """What the metric's update asks of an extractor besides features."""
    return inspect.signature(metric.update).parameters.keys() & _EXTRACTOR_WITH.keys()


def marks(name: str, fewest: int, width: int) -> tuple[str, ...]:
    """What a reader must know before comparing the value."""
    if name not in ("fid", "sfid"):
        return ()
    width = SPATIAL_WIDTH if name == "sfid" else width
    found = [f"small sample: {fewest} pictures, the distance is biased upwards"] if fewest < SMALL_SAMPLE else []
    return (*found, f"rank deficient: fewer pictures than {width} features") if fewest <= width else tuple(found)


def numbered(batches: Iterable[Mapping[str, Any]]) -> Iterable[Numbered]:
    """Batches of a loader as numbered pictures."""
    for batch in batches:
        if len(batch["key"]):
            yield torch.as_tensor(batch["position"]), batch["image"]
