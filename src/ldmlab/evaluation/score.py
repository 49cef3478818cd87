"""One pass over real and generated images with one extractor feeds every score."""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from ldmlab.errors import InputError
from ldmlab.evaluation.record import gathered
from ldmlab.metrics.features import SPATIAL_WIDTH, FeatureExtractor
from ldmlab.metrics.frechet import SMALL_SAMPLE
from ldmlab.metrics.frechet_limit import ENOUGH_A_FEATURE, FrechetLimit

_EXTRACTOR_WITH = {  # what an extractor may give besides features => one that does
    "logits": "inception",
    "spatial": "inception",
    "clip": "inception_and_clip",
    "text": "inception_and_clip",
}
Numbered = tuple[Tensor, Tensor]  # index (B,), images uint8 (B, 3, H, W)


@dataclass(frozen=True)
class Score:
    """A value with its spread (over splits or subsets; None where the score has none) and what speaks against it."""

    value: float
    spread: float | None
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionNames:
    """How the command at hand calls its options, for errors."""

    metrics: str = "protocol.metrics"  # before .NAME.OPTION of a score
    features: str = "features="  # before the name of an extractor


EVALUATE = OptionNames()


@contextmanager
def in_words_of(options: OptionNames) -> Iterator[None]:
    """Scores call their options metric.NAME.OPTION; a person is told what the command calls them."""
    try:
        yield
    except InputError as error:
        raise InputError(re.sub(r"\bmetric\.(?=\w)", f"{options.metrics}.", str(error))) from error


class EvaluationPass:
    """Takes images in any order and split over processes; keeps features where someone will look at them."""

    def __init__(
        self,
        extractor: FeatureExtractor,
        metrics: Mapping[str, Metric],
        *,
        keep: bool = False,
        captions: Callable[[int], str] | None = None,  # of the generated image of this number
        options: OptionNames = EVALUATE,
    ) -> None:
        needs = {name: _needs(metric) for name, metric in metrics.items()}
        for name, needed in needs.items():
            if missing := sorted(needed - extractor.gives):
                raise InputError(
                    f"{options.metrics}.{name} needs {missing[0]}, which {options.features}{extractor.name} does not "
                    f"give; choose {options.features}{_EXTRACTOR_WITH[missing[0]]} or leave that score out."
                )
            if "text" in needed and captions is None:
                raise InputError(
                    f"{options.metrics}.{name} needs the captions of the samples, and these were drawn without; "
                    "leave that score out."
                )
        self._captions = captions if any("text" in needed for needed in needs.values()) else None
        self.extractor, self.names, self.metrics, self.keeps = extractor, tuple(metrics), dict(metrics), keep
        self.collection = MetricCollection(dict(metrics)) if metrics else None
        self.options = options
        self.features: dict[bool, list[Tensor]] = {True: [], False: []}  # by real
        self.numbers: dict[bool, list[Tensor]] = {True: [], False: []}  # of the images whose features are kept
        self.counts = {True: 0, False: 0}
        self.also: list[EvaluationPass] = []  # see the same samples beside other real images

    def check_counts(self, real: int, generated: int, told: Set[str] = frozenset()) -> None:
        """Refuses numbers of images that a score cannot be made from, before any is drawn or looked at.

        told: scores that real images' statistics were given to, whatever their number.
        """
        with in_words_of(self.options):
            for name, metric in self.metrics.items():
                if check := getattr(metric, "check_count", None):
                    if name not in told:
                        check(real, "real")
                    check(generated, "generated")

    def add(self, images: Tensor, real: bool, index: Tensor) -> Mapping[str, Tensor]:
        """Images uint8 (B, 3, H, W) with their numbers (B,); what the extractor says of them: features (B, D)."""
        seen = self.extractor(images)
        self._take(seen, real, index)
        return seen

    def add_said(self, said: Mapping[str, Tensor], real: bool, index: Tensor) -> None:
        """What was said before, features (B, D) and maybe more, with the numbers of the images (B,)."""
        unread = {"logits": said["features"][:, :0]} if "logits" in self.extractor.gives else {}  # of real images
        self._take({**unread, **said}, real, index)

    def _take(self, seen: Mapping[str, Tensor], real: bool, index: Tensor) -> None:
        self.counts[real] += len(index)
        if self.collection is not None:
            text = {} if real or self._captions is None else {"text": self._texts(index)}
            with in_words_of(self.options):
                self.collection.update(**seen, **text, real=real, index=index)
        if self.keeps:
            self.features[real].append(seen["features"].float().cpu())
            self.numbers[real].append(index.cpu())
        for other in () if real else self.also:
            other._take(seen, real, index)

    def _texts(self, index: Tensor) -> Tensor:
        """Embeddings (B, D) of the samples' captions."""
        assert self._captions is not None
        return self.extractor.texts([self._captions(number) for number in index.tolist()])  # type: ignore[attr-defined]

    def add_all(self, batches: Iterable[Numbered], real: bool, seen: Callable[[int], object] = lambda n: None) -> None:
        """A stream of numbered images; `seen` is told how many came."""
        for index, images in batches:
            self.add(images, real, index)
            seen(len(images))

    def kept(self, real: bool) -> tuple[Tensor, Tensor]:
        """Features (N, D) that all processes kept, in the order of their images' numbers (N,)."""
        mine = (torch.cat(self.features[real]), torch.cat(self.numbers[real])) if self.features[real] else None
        shares = [share for share in gathered(mine) if share is not None]
        if not shares:
            return torch.empty(0, self.extractor.width), torch.empty(0, dtype=torch.int64)
        features, numbers = torch.cat([rows for rows, _ in shares]), torch.cat([part for _, part in shares])
        order = numbers.argsort(stable=True)
        return features[order], numbers[order]

    def for_other_samples(self) -> "EvaluationPass":
        """A pass that has seen the same real images, to be called before the first sample; it keeps no features."""
        assert self.counts[False] == 0
        other = copy.copy(self)
        other.collection, other.keeps, other.also = copy.deepcopy(self.collection), False, []
        other.metrics = dict(other.collection.items(keep_base=True)) if other.collection is not None else {}
        other.counts = dict(self.counts)
        return other

    def curves(self) -> dict[str, list[dict[str, float]]]:
        """Scores over the number of samples, by name; after `compute`."""
        return {m.score_name: m.points for m in self.metrics.values() if isinstance(m, FrechetLimit)}

    def compute(self, counts: tuple[int, int] | None = None) -> dict[str, Score]:
        """All scores; with several processes, `counts` are the real and generated images of all of them."""
        if self.collection is None:
            return {}
        with in_words_of(self.options):
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
    if name == "fid_inf" and fewest < ENOUGH_A_FEATURE * width:
        return (f"fewer than {ENOUGH_A_FEATURE} images for each of {width} features: still biased",)
    if name not in ("fid", "sfid"):
        return ()
    width = SPATIAL_WIDTH if name == "sfid" else width
    found = [f"small sample: {fewest} images, the distance is biased upwards"] if fewest < SMALL_SAMPLE else []
    return (*found, f"rank deficient: fewer images than {width} features") if fewest <= width else tuple(found)


def numbered(batches: Iterable[Mapping[str, Any]]) -> Iterable[Numbered]:
    """Batches of a loader as numbered images."""
    for batch in batches:
        if len(batch["key"]):
            yield torch.as_tensor(batch["position"]), batch["image"]
