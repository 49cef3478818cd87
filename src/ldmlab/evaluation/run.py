"""One evaluation run: source and reference set => extractor => metrics => record.

Every evaluation is one: samples of a model, reconstructions of a first stage, sets of images on disk, a model that is
being trained.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torchmetrics import Metric

from ldmlab import distributed
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.shard_data import ShardData
from ldmlab.disks import disk_errors, own_folder
from ldmlab.errors import InputError
from ldmlab.evaluation import protocol as protocols
from ldmlab.evaluation.controls import controls_of, doubted
from ldmlab.evaluation.real_images import RealImages, SplitReference
from ldmlab.evaluation.record import FORMAT_VERSION, Paper, check_reference, features_record
from ldmlab.evaluation.scoring import EVALUATE, EvaluationPass, Numbered, OptionNames, Score, Track, untracked
from ldmlab.evaluation.sources import Source
from ldmlab.files import write_json
from ldmlab.nn.lpips import LPIPS
from ldmlab.provenance import provenance

TAG = "in_training"
BUSY = "out={} is being written by another evaluation"
OPTIONS = OptionNames("callbacks.scores.protocol.metrics", "features@callbacks.scores.features=")
_TAKEN = frozenset(  # fields of a protocol that mean the same here
    {"name", "reference", "metrics", "samples", "at_most", "conditions", "classes", "reference_limit", "steps", "eta"}
    | {"guidance_scale", "sampler", "spacing", "seed", "dataset", "feature_network", "reference_rule", "reference_hash"}
    | {"guidance_interval", "guidance_interval_unit", "guidance_rescale", "guided_channels"}
    | {"max_bad", "leaves_open"}
    | {"shown", "paper_table", "paper_row"}  # no report is written, and no table takes these numbers
)
Watch = Callable[[Iterable[Numbered]], Iterable[Numbered]]  # a stream of images => the same stream


class Reference(Protocol):
    """The real images that a source is compared with."""

    @property
    def count(self) -> int: ...  # images; 0: statistics alone

    def given(self, seen: EvaluationPass) -> frozenset[str]: ...  # metrics that take statistics in place of images

    def show_to(self, seen: EvaluationPass) -> None: ...  # update the metrics with this process's share

    def record(self, images: int) -> dict[str, Any]: ...  # for metrics.json

    def marks(self) -> tuple[str, ...]: ...  # caveats of every score


@dataclass
class Run:
    """`begin` reads the reference and makes all checks; `finish` reads the source and returns the record."""

    source: Source
    reference: Reference
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    batch_size: int = 64
    track: Track = untracked
    options: OptionNames = EVALUATE
    keep: bool = False  # features, for neighbours and classes
    controls: dict[str, Any] = field(default_factory=dict)  # between `begin` and `finish`, see controls.py

    def begin(self) -> EvaluationPass:
        """The pass over the images, once it has seen the reference."""
        for metric in self.metrics.values():
            metric.reset()
        seen = EvaluationPass(
            self.extractor, self.metrics, keep=self.keep, captions=self.source.captions, options=self.options
        )
        seen.check_counts(self.reference.count, self.source.count, self.reference.given(seen))
        self.reference.show_to(seen)
        return seen

    def finish(self, seen: EvaluationPass, watch: Watch = lambda stream: stream) -> dict[str, Any]:
        """The record, on every process; `watch` receives the images before the metrics do."""
        seen.add_all(watch(self.source.images(self.batch_size, self.track)), real=False)
        real, generated = seen.total_counts()
        scores = doubted(seen.compute((real or generated, generated)), self.controls)
        return {
            "format_version": FORMAT_VERSION,
            "sampling": self.source.record(generated),
            "reference": self.reference.record(real),
            "features": features_record(self.extractor),
            "scores": self.marked(scores),
            "controls": self.controls,
            "sample_curves": seen.curves(),
            "provenance": provenance(),
        }

    def marked(self, scores: Mapping[str, Score]) -> dict[str, dict[str, Any]]:
        """As plain data, with the caveats of the reference."""
        own = self.reference.marks()
        return {name: asdict(replace(score, marks=(*own, *score.marks))) for name, score in scores.items()}


# ---- an evaluation with a folder


@dataclass
class Setup:
    """What the scores of a model are made from; `run` makes them once."""

    model: Any  # a loaded model, or a first stage
    data: ShardData
    protocol: protocols.Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    out: Path
    batch_size: int = 64  # images at once
    curves: Mapping[str, Path] = field(default_factory=dict)  # title => metrics.csv of a run
    lpips: LPIPS | None = None  # of pairs of images
    reference_folder: Path | None = None  # of kept reference statistics; None: none are kept
    track: Track = untracked
    paper: Paper = lambda result: None

    def run(self) -> dict[str, Any]:
        """The content of metrics.json (on every process); the first one writes it, last of all files."""
        began = time.monotonic()
        with own_folder(partial(check_out, self.out), ".lock", BUSY), disk_errors(self.out):
            check_reference(self.protocol, self.data)
            result = self.scored()
            result["seconds"] = round(time.monotonic() - began, 1)
            result["paper"] = self.paper(result)
            if distributed.rank() == 0:
                self.write_files(result)
                write_json(self.out / "metrics.json", result)
        return result

    def scored(self) -> dict[str, Any]:
        """The record without time and paper."""
        raise NotImplementedError

    def write_files(self, result: dict[str, Any]) -> None:
        """Further files of the report, with their names in the record."""

    def real(self) -> RealImages:
        """The images that samples are compared with."""
        return RealImages(self.data, self.extractor, self.reference_folder, self.batch_size, self.track)

    def run_of(self, source: Source, reference: SplitReference, keep: bool = False) -> Run:
        """The run of a source; `keep`: the features too."""
        return Run(source, reference, self.extractor, self.metrics, self.batch_size, self.track, keep=keep)

    def begun(self, run: Run) -> EvaluationPass:
        """The pass that has seen the reference, once the controls are scored too."""
        seen, protocol = run.begin(), self.protocol
        if protocol.controls:
            run.controls = controls_of(self.real(), protocol.reference, seen, run.source.count, protocol.controls)
        return seen

    def protocol_record(self, seen: EvaluationPass) -> dict[str, Any]:
        """The protocol, with the options that its scores derived."""
        plain = self.protocol.as_plain()
        nodes = {name: {**node, **seen.used_options().get(name, {})} for name, node in plain["metrics"].items()}
        return plain | {"metrics": nodes}


def check_out(out: Path) -> Path:
    """The same folder; one that holds a finished evaluation is not written over."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; choose a folder.")
    if (out / "metrics.json").exists():
        raise InputError(f"out={out} already holds an evaluation; choose another folder or delete it.")
    if any((out / name).exists() for name in ("manifest.json", "model.yaml")):
        raise InputError(f"out={out} holds shards or a model; choose a folder of its own.")
    if mine := [name for name in ("report.md", "report.html") if (out / name).exists()]:
        raise InputError(f"out={out} holds {mine[0]}, which would be replaced; choose another folder.")
    return out


# ---- scores while training


@dataclass
class TrainingScores:
    """Scores of a model in training: few images, but the run, the metrics and the record of evaluate.py.

    `check` before the first step, `score` as often as needed. The record has the tag `in_training` with the step and
    the number of images, and comparisons leave it out.
    """

    protocol: protocols.Protocol
    source: Source
    real: RealImages  # at the model's size, with its task
    metrics: Mapping[str, Any]
    limit: int | None = None  # real images compared with; None: all of the split
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        real, protocol = self.real, self.protocol
        reference = SplitReference(
            real, protocol.reference, self.limit, protocol.max_bad, "callbacks.scores.protocol.max_bad"
        )
        self.run = Run(self.source, reference, real.extractor, self.metrics, real.batch_size, real.track, OPTIONS)

    def check(self, device: torch.device) -> frozenset[str]:
        """Names of the scores; all checks are made now, by a pass with noise images as samples."""
        for item in fields(self.protocol):
            usual = item.default_factory() if item.default_factory is not MISSING else item.default
            if item.name not in _TAKEN and getattr(self.protocol, item.name) != usual:
                raise InputError(
                    f"callbacks.scores.protocol.{item.name}={getattr(self.protocol, item.name)} is for evaluate.py "
                    "alone; score with protocol@callbacks.scores.protocol=in_training while training."
                )
        check_reference(self.protocol, self.real.data)
        self.run.extractor.to(device)  # type: ignore[attr-defined]
        side, self.count = self.real.data.image_size, self.source.count
        seen = self.run.begin()
        mine = torch.arange(distributed.rank(), self.count, distributed.world_size())
        for index in mine.split(self.run.batch_size) if len(mine) else ():
            seen.add(torch.randint(0, 256, (len(index), 3, side, side), dtype=torch.uint8), False, index)
        names = frozenset(seen.compute())
        self._reset()
        return names

    def score(self, step: int, model: Mapping[str, Any]) -> dict[str, Any]:
        """A metrics.json with the tag, on every process; `model`: its entry in the record."""
        began = time.monotonic()
        result = self.run.finish(self.run.begin())
        self._reset()
        count = result["sampling"]["images"]
        note = f"scored while training, on {count} samples"
        return result | {
            TAG: {"step": step, "samples": count},
            "protocol": replace(self.protocol, paper_table=None, paper_row=None).as_plain(),
            "model": {**model, "step": step},
            "scores": {name: {**s, "marks": (*s["marks"], note)} for name, s in result["scores"].items()},
            "buckets": {},
            "images": {"samples": [], "real": [], "extras": []},
            "curves": [],
            "seconds": round(time.monotonic() - began, 1),
            "paper": None,
        }

    def _reset(self) -> None:
        """Free the memory of thousands of features."""
        for metric in self.metrics.values():
            metric.reset()
