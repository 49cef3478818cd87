"""Score a model by a protocol: draw, look once with one extractor, judge, find neighbours, write it all down.

OUT/ metrics.json, images/, curves/. Several processes share the drawing and the looking.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.audit import Audit
from ldmlab.evaluation.by_class import asked_classes, by_class
from ldmlab.evaluation.category_score import CategoryScore
from ldmlab.evaluation.drawing import Drawing, Requests, Track
from ldmlab.evaluation.guidance_curve import GuidanceCurve
from ldmlab.evaluation.paired import PairedPass
from ldmlab.evaluation.protocol import Protocol, requests
from ldmlab.evaluation.real_images import RealImages
from ldmlab.evaluation.record import (
    FORMAT_VERSION,
    Paper,
    check_reference,
    features_record,
    gathered,
    parameters_record,
    perceptual_record,
    reference_record,
    throughput,
    timed,
)
from ldmlab.evaluation.score import EvaluationPass, Numbered
from ldmlab.evaluation.task_evidence import Baseline, Judge
from ldmlab.evaluation.task_part import task_part
from ldmlab.inference.image_files import copy_curves, copy_images, planned, save_image
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.provenance import provenance

Album = Mapping[str, list[dict[str, Any]]]  # samples and real => number, file, caption of those that are shown


@dataclass(frozen=True)
class Plan:
    """What is asked of the model, and who looks at the answers."""

    settings: SampleSettings  # resolved
    known: Requests  # what the reference images say
    asked: Requests
    album: Album
    seen: EvaluationPass


@dataclass
class Evaluation:
    """All that a score is made from; `run` does it once."""

    model: LoadedModel
    data: ShardData
    protocol: Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    out: Path
    batch_size: int = 64  # images at once
    rank: int = 0
    world: int = 1
    curves: Mapping[str, Path] = field(default_factory=dict)  # title => metrics.csv of a run
    extras: Sequence[tuple[str, Path]] = ()  # title, image made elsewhere: sweeps, strips
    lpips: nn.Module | None = None  # for protocol.pairs
    judges: Mapping[str, Judge] = field(default_factory=dict)  # of protocol.judges
    baselines: Mapping[str, Baseline] = field(default_factory=dict)  # of protocol.baselines
    paper: Paper = lambda result: None
    reference_folder: Path | None = None  # of kept reference statistics; None: none are kept
    track: Track = lambda items, count, title: items
    clock: list[float] = field(default_factory=list)  # seconds that each batch of samples took

    def __post_init__(self) -> None:
        shared = (self.batch_size, self.rank, self.world, self.track)
        self.real = RealImages(self.data, self.extractor, self.reference_folder, *shared)
        self.drawing = Drawing(self.model, *shared)

    def run(self) -> dict[str, Any]:
        """The content of metrics.json (on every process); the first process writes the files."""
        began = time.monotonic()
        check_out(self.out)
        check_reference(self.protocol, self.data)
        plan = self._plan()
        result = self._scored(plan)
        if self.protocol.neighbours:
            audit = Audit(self.protocol, self.real, self.drawing, self.out, plan.asked, plan.known)
            result["neighbours"] = audit.run(plan.seen, plan.album["samples"])
        if self.protocol.class_field:
            result["by_class"] = self._by_class(plan, self.protocol.class_field)
        if self.protocol.category_field:
            result["categories"] = self._categories(plan.known)
        result["seconds"] = round(time.monotonic() - began, 1)
        result["provenance"] = provenance()
        result["paper"] = self.paper(result)
        if self.rank == 0:
            self._write(result, plan.album)
        return result

    def _plan(self) -> Plan:
        """What can be refused is refused here."""
        protocol = self.protocol
        for scale in (None, *protocol.guidance_scale_curve):  # refused before anything is read
            self.model.resolved(protocol.settings(scale))
        known = self.real.known(protocol.reference, self._fields(), protocol.reference_limit)
        asked = requests(protocol, self.model.reads, known)
        settings = self.model.resolved(protocol.settings(), asked)
        captions = (lambda number: str(asked[number]["caption"])) if "caption" in self.model.reads else None
        keep = protocol.neighbours > 0 or protocol.class_field is not None
        count = min(protocol.samples or len(known), len(known))
        album = planned(known, count, min(max(protocol.shown, protocol.neighbours), count))
        seen = EvaluationPass(self.extractor, self.metrics, keep=keep, captions=captions)
        seen.check_counts(len(known), count)
        return Plan(settings, known, asked, album, seen)

    def _fields(self) -> set[str]:
        """What is read of every reference image."""
        judged = {self.protocol.category_field, self.protocol.class_field}
        return {*self.model.reads, *(name for name in judged if name is not None)}

    def _scored(self, plan: Plan) -> dict[str, Any]:
        """The reference, then the samples, past everyone who looks at them."""
        protocol, seen = self.protocol, plan.seen
        pairs = PairedPass(protocol, plan.known, self.extractor, self.lpips) if protocol.pairs else None
        self.real.save(self.out, protocol.reference, plan.album["real"])
        kept = self.real.show_to(seen, protocol.reference, protocol.reference_limit)
        other = self.real.beside(seen, protocol.also_against) if protocol.also_against else None
        curve = GuidanceCurve(protocol.guidance_scale_curve, seen, plan.settings)
        task = task_part(self, plan.known, plan.asked, seen, [item["number"] for item in plan.album["samples"]])
        drawn = task.watch(self._drawn(plan))
        seen.add_all(pairs.watch(drawn) if pairs else drawn, real=False)
        counts = (sum(gathered(seen.counts[True])), sum(gathered(seen.counts[False])))
        own = seen.compute(counts)
        scores = own | (pairs.scores() if pairs else {})
        if other:
            scores["fid_other_split"] = other.compute((sum(gathered(other.counts[True])), counts[1]))["fid"]
        return {
            **self._head(plan, counts, kept),
            "scores": {name: asdict(score) for name, score in scores.items()},
            "sample_curves": seen.curves(),
            "guidance_scale_curve": curve.run(self.drawing, plan.asked, own),
            "buckets": pairs.buckets() if pairs else {},
            **task.run(),
        }

    def _head(self, plan: Plan, counts: tuple[int, int], kept: bool) -> dict[str, Any]:
        """What was measured, and with what."""
        sampling = {"images": counts[1], "conditions": self.protocol.conditions, "precision": self.model.precision}
        return {
            "format_version": FORMAT_VERSION,
            "protocol": self.protocol.as_plain(),
            "model": {name: value for name, value in self.model.info.items() if name != "spec"}
            | parameters_record(self.model.diffusion),
            "sampling": plan.settings.as_text() | sampling | throughput(counts[1], self.clock),
            "reference": reference_record(self.data, self.protocol.reference, counts[0]) | {"kept": kept},
            "features": features_record(self.extractor),
            **({"perceptual": perceptual_record(self.lpips)} if self.protocol.pairs else {}),
        }

    def _drawn(self, plan: Plan) -> Iterable[Numbered]:
        """This process's samples; those of the report to its folder."""
        shown = {item["number"] for item in plan.album["samples"]}
        for index, images in timed(self.drawing.share(plan.asked, plan.settings, "samples"), self.clock):
            for number, image in zip(index.tolist(), images, strict=True):
                if number in shown:
                    save_image(self.out, "sample", number, image)
            yield index, images

    # ---- what else is said about the samples

    def _by_class(self, plan: Plan, name: str) -> list[dict[str, Any]]:
        real = self.real.labels(self.protocol.reference, name, self.protocol.reference_limit)
        return by_class(plan.seen, asked_classes(name, plan.asked, plan.known), real)

    def _categories(self, known: Requests) -> dict[str, Any]:
        show = lambda updates: self.track(updates, len(updates), "the category judge learns")  # noqa: E731
        part = CategoryScore(self.protocol, self._drawn_whole, self._saved, self._batches, show)
        return part.run(known, self.real.known("train", self._fields()))

    def _drawn_whole(self, asked: Requests, first: int) -> Tensor:
        settings = self.protocol.settings(self.protocol.category_guidance_scale)
        return self.drawing.whole(asked, settings, "by category", first)

    def _saved(self, name: str, number: int, image: Tensor) -> str:
        return save_image(self.out, name, number, image) if self.rank == 0 else ""

    def _batches(self, split: str) -> Iterable[dict[str, Any]]:
        """All images of a split with their category, on every process."""
        fields = tuple(dict.fromkeys((*self.data.fields, str(self.protocol.category_field))))
        return replace(self.data, fields=fields).eval_loader(split, 256, kind="images")

    # ---- writing

    def _write(self, result: dict[str, Any], album: Album) -> None:
        result["images"] = {kind: album[kind] for kind in ("samples", "real")}
        result["images"]["extras"] = copy_images(self.out, self.extras)
        result["curves"] = copy_curves(self.out, self.curves)
        (self.out / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def check_out(out: Path) -> None:
    """A folder that holds a finished evaluation is not written over."""
    if (out / "metrics.json").exists():
        raise InputError(f"out={out} already holds an evaluation; choose another folder or delete it.")
