"""Scores: one pass over real and generated images with one extractor updates every metric."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ldmlab import distributed
from ldmlab.contracts import FeatureExtractor
from ldmlab.errors import InputError
from ldmlab.metrics.features import SPATIAL_WIDTH
from ldmlab.metrics.frechet import SMALL_SAMPLE
from ldmlab.metrics.frechet_limit import ENOUGH_A_FEATURE, FrechetLimit

_EXTRACTOR_WITH = {  # what an extractor may give besides features => one that does
    "logits": "inception",
    "spatial": "inception",
    "clip": "inception_and_clip",
    "text": "inception_and_clip",
}
_BY_BALLS = ("precision", "recall", "density", "coverage")
ENOUGH_FOR_BALLS = 1000  # images; k-NN balls of fewer cover wide gaps
Numbered = tuple[Tensor, Tensor]  # index (B,), images uint8 (B, 3, H, W)
Track = Callable[[Iterable[Any], int, str], Iterable[Any]]  # (items, how many, title) => the same items, shown


def untracked(items: Iterable[Any], count: int, title: str) -> Iterable[Any]:
    """The items as they are."""
    return items


@dataclass(frozen=True)
class Score:
    """A value with its spread (over splits or subsets; None where the score has none), its caveats and its reading."""

    value: float
    spread: float | None
    marks: tuple[str, ...] = ()
    title: str = ""  # "": the score's name
    meaning: str = ""
    higher_is_better: bool | None = None  # None: not known


def described(score: Score, name: str, metric: object) -> Score:
    """With the title, meaning and direction declared by the metric's class, for all its scores or by score."""

    def declared(key: str) -> Any:
        found = getattr(metric, key, None)
        return found.get(name) if isinstance(found, Mapping) else found

    title, meaning = (str(declared(key) or "") for key in ("title", "meaning"))
    return replace(score, title=title, meaning=meaning, higher_is_better=declared("higher_is_better"))


@dataclass(frozen=True)
class OptionNames:
    """Names of a command's options, for errors."""

    metrics: str = "protocol.metrics"  # before .NAME.OPTION of a score
    features: str = "features="  # before the name of an extractor


EVALUATE = OptionNames()


@contextmanager
def in_words_of(options: OptionNames) -> Iterator[None]:
    """Rename options metric.NAME.OPTION in error messages to those of the current command."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(r"\bmetric\.(?=\w)", f"{options.metrics}.", str(error))) from error


class EvaluationPass:
    """Updates metrics with images in any order, split over processes; `keep`: also stores the features."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        metrics: Mapping[str, Metric],
        *,
        keep: bool = False,
        captions: Callable[[int], str] | None = None,  # of the generated image of this number
        options: OptionNames = EVALUATE,
    ) -> None:
        needs = {name: inputs_of(metric).keys() & _EXTRACTOR_WITH.keys() for name, metric in metrics.items()}
        for name, needed in needs.items():
            if missing := sorted(needed - extractor.gives):
                raise InputError(
                    f"{options.metrics}.{name} needs {missing[0]}, which {options.features}{extractor.name} does not "
                    f"give; choose {options.features}{_EXTRACTOR_WITH[missing[0]]} or leave that score out."
                )
            if "text" in needed and captions is None:
                raise InputError(
                    f"{options.metrics}.{name} needs the captions of the samples, and these have none; "
                    "leave that score out."
                )
        self._captions = captions if any("text" in needed for needed in needs.values()) else None
        self.extractor, self.names, self.metrics, self.keeps = extractor, tuple(metrics), dict(metrics), keep
        self.collection = MetricCollection(dict(metrics)) if metrics else None
        self.options = options
        self.features: dict[bool, list[Tensor]] = {True: [], False: []}  # by real
        self.numbers: dict[bool, list[Tensor]] = {True: [], False: []}  # of the images whose features are kept
        self.counts = {True: 0, False: 0}
        self.also: list[EvaluationPass] = []  # compare the same samples with other real images

    def check_counts(self, real: int, generated: int, given: Set[str] = frozenset()) -> None:
        """Refuses numbers of images that are too small for a score, before any is generated or read.

        given: metrics that were given the statistics of the real images, whatever their number.
        """
        with in_words_of(self.options):
            for name, metric in self.metrics.items():
                if check := getattr(metric, "check_count", None):
                    if name not in given:
                        check(real, "real")
                    check(generated, "generated")

    def add(self, images: Tensor, real: bool, index: Tensor) -> Mapping[str, Tensor]:
        """Images uint8 (B, 3, H, W) with their numbers (B,) => the extractor's output: features (B, D) and more."""
        seen = self.extractor(images)
        self._take(seen, real, index)
        return seen

    def add_features(self, found: Mapping[str, Tensor], real: bool, index: Tensor) -> None:
        """Cached output of the extractor, features (B, D) and optionally more, with the numbers of the images (B,)."""
        unread = {"logits": found["features"][:, :0]} if "logits" in self.extractor.gives else {}  # of real images
        self._take({**unread, **found}, real, index)

    def _take(self, seen: Mapping[str, Tensor], real: bool, index: Tensor) -> None:
        self.counts[real] += len(index)
        if self.collection is not None:
            text = {}
            if not real and self._captions is not None:  # (B, D)
                captions = [self._captions(number) for number in index.tolist()]
                text = {"text": self.extractor.texts(captions)}  # type: ignore[attr-defined]
            with in_words_of(self.options):
                self.collection.update(**seen, **text, real=real, index=index)
        if self.keeps:
            self.features[real].append(seen["features"].float().cpu())
            self.numbers[real].append(index.cpu())
        for other in () if real else self.also:
            other._take(seen, real, index)

    def add_all(self, batches: Iterable[Numbered], real: bool) -> None:
        for index, images in batches:
            self.add(images, real, index)

    def kept(self, real: bool) -> tuple[Tensor, Tensor]:
        """Features (N, D) that all processes kept, in the order of their images' numbers (N,)."""
        shares = distributed.gather((self.features[real], self.numbers[real]))
        features = torch.cat([torch.empty(0, self.extractor.width), *(rows for part, _ in shares for rows in part)])
        numbers = torch.cat([torch.empty(0, dtype=torch.int64), *(some for _, part in shares for some in part)])
        order = numbers.argsort(stable=True)
        return features[order], numbers[order]

    def for_other_samples(self) -> "EvaluationPass":
        """A pass with the same real images, to be called before the first sample; it stores no features."""
        assert self.counts[False] == 0
        other = copy.copy(self)
        other.collection, other.keeps, other.also = copy.deepcopy(self.collection), False, []
        other.metrics = dict(other.collection.items(keep_base=True)) if other.collection is not None else {}
        other.counts = dict(self.counts)
        return other

    def curves(self) -> dict[str, list[dict[str, float]]]:
        """Scores over the number of samples, by name; after `compute`."""
        return {m.score_name: m.points for m in self.metrics.values() if isinstance(m, FrechetLimit)}

    def total_counts(self) -> tuple[int, int]:
        """Real and generated images of all processes."""
        both = distributed.gather((self.counts[True], self.counts[False]))
        return sum(real for real, _ in both), sum(generated for _, generated in both)

    def compute(self, counts: tuple[int, int] | None = None) -> dict[str, Score]:
        """All scores; `counts`: real and generated images of all processes (default: counted here)."""
        if self.collection is None:
            return {}
        fewest = min(counts or self.total_counts())
        scores: dict[str, Score] = {}
        with in_words_of(self.options):
            for name, metric in self.collection.items(keep_base=True, copy_state=False):
                found = metric.compute()
                found = found if isinstance(found, dict) else {name: found}
                values = {str(key): float(value) for key, value in found.items()}
                for key in (key for key in values if not key.endswith("_std")):
                    caveats = _caveats(key, values[key], fewest, metric, self.extractor.width)
                    score = Score(values[key], values.get(f"{key}_std"), caveats)
                    scores[key if key not in scores else f"{name}_{key}"] = described(score, key, metric)
        return scores

    def used_options(self) -> dict[str, dict[str, Any]]:
        """Options that a metric derived from the number of images, by metric; after `compute`."""
        return {name: dict(vars(m)["resolved"]) for name, m in self.metrics.items() if vars(m).get("resolved")}


def inputs_of(metric: Metric) -> dict[str, bool]:
    """What the metric's update takes, by name, and whether it must be there."""
    parameters = inspect.signature(metric.update).parameters.values()
    return {one.name: one.default is one.empty for one in parameters}


def _caveats(name: str, value: float, fewest: int, metric: Metric, width: int) -> tuple[str, ...]:
    """Marks of a score: its sample's, the metric's own, and a value that is not finite."""
    own = getattr(metric, "remarks", {}).get(name)
    found = [*_of_the_sample(name, fewest, width), *([own] if own else [])]
    found += [] if math.isfinite(value) else [f"the value is {value}: this metric fails on these images"]
    return tuple(found)


def _of_the_sample(name: str, fewest: int, width: int) -> list[str]:
    """Conditions on which the value can be compared."""
    if name == "fid_inf" and fewest < ENOUGH_A_FEATURE * width:
        return [f"fewer than {ENOUGH_A_FEATURE} images for each of {width} features: still biased"]
    if name in _BY_BALLS and fewest < ENOUGH_FOR_BALLS:
        return [f"small sample: {fewest} images, and below {ENOUGH_FOR_BALLS} noise can score high"]
    if name not in ("fid", "sfid"):
        return []
    width = SPATIAL_WIDTH if name == "sfid" else width
    found = [f"small sample: {fewest} images, the distance is biased upwards"] if fewest < SMALL_SAMPLE else []
    return [*found, f"rank deficient: fewer images than {width} features"] if fewest <= width else found


def numbered(batches: Iterable[Mapping[str, Any]]) -> Iterable[Numbered]:
    for batch in batches:
        if len(batch["key"]):
            yield torch.as_tensor(batch["position"]), batch["image"]
