"""One evaluation run: source and reference set => extractor => metrics => record.

Every evaluation is one: samples of a model, reconstructions of a first stage, sets of images on disk, a model that is
being trained.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from torchmetrics import Metric

from ldmlab.evaluation.record import FORMAT_VERSION, features_record
from ldmlab.evaluation.scoring import EVALUATE, EvaluationPass, Numbered, OptionNames, Score, Track, untracked
from ldmlab.evaluation.sources import Source
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.provenance import provenance

Watch = Callable[[Iterable[Numbered]], Iterable[Numbered]]  # a stream of images => the same stream


class Reference(Protocol):
    """The real images that a source is compared with."""

    @property
    def count(self) -> int: ...  # images; 0: statistics alone

    @property
    def given(self) -> frozenset[str]: ...  # metrics that are given statistics in place of images

    def show_to(self, seen: EvaluationPass) -> None: ...  # update the metrics with this process's share

    def record(self, images: int) -> dict[str, Any]: ...  # for metrics.json

    def marks(self) -> tuple[str, ...]: ...  # caveats of every score


@dataclass
class Run:
    """`begin` reads the reference and refuses what can be refused; `finish` reads the source and returns the record."""

    source: Source
    reference: Reference
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    batch_size: int = 64
    track: Track = untracked
    options: OptionNames = EVALUATE
    keep: bool = False  # features, for neighbours and classes

    def begin(self) -> EvaluationPass:
        """The pass over the images, once it has seen the reference."""
        for metric in self.metrics.values():
            metric.reset()
        seen = EvaluationPass(
            self.extractor, self.metrics, keep=self.keep, captions=self.source.captions, options=self.options
        )
        seen.check_counts(self.reference.count, self.source.count, self.reference.given)
        self.reference.show_to(seen)
        return seen

    def finish(self, seen: EvaluationPass, watch: Watch = lambda stream: stream) -> dict[str, Any]:
        """The record, on every process; `watch` may look at the images on their way to the metrics."""
        seen.add_all(watch(self.source.images(self.batch_size, self.track)), real=False)
        real, generated = seen.total_counts()
        scores = seen.compute((real or generated, generated))
        return {
            "format_version": FORMAT_VERSION,
            "sampling": self.source.record() | {"images": generated},
            "reference": self.reference.record(real),
            "features": features_record(self.extractor),
            "scores": {name: asdict(self.marked(score)) for name, score in scores.items()},
            "sample_curves": seen.curves(),
            "provenance": provenance(),
        }

    def marked(self, score: Score) -> Score:
        """With the caveats of the reference."""
        return replace(score, marks=(*self.reference.marks(), *score.marks))
