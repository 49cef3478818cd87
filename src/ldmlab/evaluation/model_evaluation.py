"""Evaluation of a model: generate, extract features once, compute metrics, find nearest neighbours, record.

OUT/ metrics.json, images/, curves/. Several processes share the work, and the first one writes.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from ldmlab import distributed
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.breakdowns import GuidanceCurve, by_class, labels, sample_classes
from ldmlab.evaluation.evaluators import Baseline, Evaluator
from ldmlab.evaluation.memorisation import Audit
from ldmlab.evaluation.paired import PairedPass, pair_scores
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import Fields, RealImages, SplitReference, conditions
from ldmlab.evaluation.record import Paper, all_items, check_reference, parameters_record, perceptual_record, throughput
from ldmlab.evaluation.run import Run
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Track, untracked
from ldmlab.evaluation.sources import Reconstructions, Samples
from ldmlab.evaluation.task_part import TaskPart
from ldmlab.files import FileLock, disk_errors, write_json
from ldmlab.inference.image_files import copy_curves, copy_images, planned, save_image
from ldmlab.inference.model import LoadedModel
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.metrics.reconstruction import ReconstructionMeasures
from ldmlab.nn.lpips import LPIPS

Shown = Mapping[str, list[dict[str, Any]]]  # samples and real => number, file, caption of those that are shown


def _no_paper(result: Mapping[str, Any]) -> dict[str, Any] | None:
    return None


@dataclass
class Evaluation:
    """Everything that samples of a model are scored with; `run` does it once."""

    model: LoadedModel
    data: ShardData
    protocol: Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    out: Path
    batch_size: int = 64  # images at once
    curves: Mapping[str, Path] = field(default_factory=dict)  # title => metrics.csv of a run
    extras: Sequence[tuple[str, Path]] = ()  # title, image made elsewhere: sweeps, trajectories
    lpips: nn.Module | None = None  # for protocol.pairs
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)  # of protocol.evaluators
    baselines: Mapping[str, Baseline] = field(default_factory=dict)  # of protocol.baselines
    reference_folder: Path | None = None  # of kept reference statistics; None: none are kept
    track: Track = untracked
    paper: Paper = _no_paper

    def run(self) -> dict[str, Any]:
        """The content of metrics.json (on every process); the first process writes the files."""
        began = time.monotonic()
        with output_folder(self.out):
            check_reference(self.protocol, self.data)
            self._prepare()
            result = self._scored()
            self._more(result)
            return finished(self.out, result, self.protocol, self.paper, began, self._write)

    def _prepare(self) -> None:
        """All checks that can fail, before an image is read or sampled."""
        protocol = self.protocol
        for scale in (None, *protocol.guidance_scale_curve):
            self.model.resolved(protocol.settings(scale))
        self.known = self._known(protocol.reference, protocol.reference_limit)
        self.samples = Samples(self.model, protocol, self.known)
        count = min(self.samples.count, len(self.known))
        self.shown: Shown = planned(self.known, count, min(max(protocol.shown, protocol.neighbours), count))
        shared = (self.reference_folder, self.batch_size, self.track)
        self.real = RealImages(self.data, self.extractor, *shared)

    def _known(self, split: str, limit: int | None = None) -> Sequence[Fields]:
        """The fields of a split's images that the model or the protocol reads."""
        also = {name for one in self.evaluators.values() for name in getattr(one, "reads", ())}
        also |= {self.protocol.class_field} if self.protocol.class_field else set()
        return conditions(self.data, split, sorted({*self.model.reads, *also}), limit)

    def _scored(self) -> dict[str, Any]:
        """Processes the reference, then the samples: metrics and all observers."""
        protocol = self.protocol
        reference = SplitReference(self.real, protocol.reference, protocol.reference_limit, protocol.max_bad)
        keep = protocol.neighbours > 0 or protocol.class_field is not None
        run = Run(self.samples, reference, self.extractor, self.metrics, self.batch_size, self.track, keep=keep)
        pairs = PairedPass(protocol, self.known, self.extractor, self.lpips) if protocol.pairs else None
        self.real.save(self.out, protocol.reference, self.shown["real"])
        self.seen = seen = run.begin()
        other = reference.beside(seen, protocol.also_against) if protocol.also_against else None
        curve = GuidanceCurve(protocol.guidance_scale_curve, seen, self.samples)
        task = self._task_part()
        self.samples.say_time(self.batch_size, 1 + len(curve.scales))
        watched = lambda stream: task.watch(self._saved(stream))  # noqa: E731
        result = run.finish(seen, (lambda stream: pairs.watch(watched(stream))) if pairs else watched)
        own = dict(result["scores"])
        result["sampling"] |= throughput(result["sampling"]["images"], self.samples.clock)
        if pairs:
            result["scores"] |= {name: asdict(run.marked(score)) for name, score in pairs.scores().items()}
        if other:
            distance = other.compute((other.total_counts()[0], result["sampling"]["images"]))["fid"]
            title = f"{distance.title}, other split"
            result["scores"]["fid_other_split"] = asdict(run.marked(replace(distance, title=title)))
        result["protocol"] = recorded(protocol, seen)
        result["model"] = {name: value for name, value in self.model.info.items() if name != "spec"}
        result["model"] |= parameters_record(self.model.diffusion)
        if pairs:
            result["perceptual"] = perceptual_record(self.lpips)
        result["guidance_scale_curve"] = curve.run(own, self.batch_size, self.track)
        return result | {"buckets": pairs.buckets() if pairs else {}} | task.run()

    def _task_part(self) -> TaskPart:
        return TaskPart(
            evaluators=self.evaluators,
            baselines=self.baselines,
            protocol=self.protocol,
            samples=self.samples,
            known=lambda split: self.known if split == self.protocol.reference else self._known(split),
            data=self.data,
            seen=self.seen,
            lpips=self.lpips,
            out=self.out,
            shown=[item["number"] for item in self.shown["samples"]],
            batch_size=self.batch_size,
            track=self.track,
        )

    def _saved(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same samples; those of the report are written to files."""
        shown = {item["number"] for item in self.shown["samples"]}
        for index, images in stream:
            for number, image in zip(index.tolist(), images, strict=True):
                if number in shown:
                    save_image(self.out, "sample", number, image)
            yield index, images

    # ---- further parts of the record

    def _more(self, result: dict[str, Any]) -> None:
        """Search for copies and scores by class."""
        protocol = self.protocol
        if protocol.neighbours:
            audit = Audit(protocol, self.real, self.samples, self.out, self.known)
            result["neighbours"] = audit.run(self.seen, self.shown["samples"])
        if name := protocol.class_field:
            real = labels(self.data, protocol.reference, name, protocol.reference_limit)
            result["by_class"] = by_class(self.seen, sample_classes(name, self.samples.requests, self.known), real)

    def _write(self, result: dict[str, Any]) -> None:
        result["images"] = {kind: self.shown[kind] for kind in ("samples", "real")}
        result["images"]["extras"] = copy_images(self.out, self.extras)
        result["curves"] = copy_curves(self.out, self.curves)


@dataclass
class ReconstructionEvaluation:
    """PSNR, SSIM, with VGG's weights LPIPS and PSIM, and feature distances of a first stage's reconstructions."""

    first_stage: nn.Module
    info: Mapping[str, Any]  # path, weights, step, fingerprint
    data: ShardData
    protocol: Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    lpips: LPIPS | None
    out: Path
    batch_size: int = 32
    curves: Mapping[str, Path] = field(default_factory=dict)
    reference_folder: Path | None = None
    track: Track = untracked
    paper: Paper = _no_paper

    def run(self) -> dict[str, Any]:
        """The content of metrics.json (on every process), which the first process writes."""
        began = time.monotonic()
        with output_folder(self.out):
            return finished(self.out, self._scored(), self.protocol, self.paper, began, lambda result: None)

    @torch.inference_mode()
    def _scored(self) -> dict[str, Any]:
        check_reference(self.protocol, self.data)
        unweighted = None if self.lpips is None else self.lpips.unweighted
        self.measures = ReconstructionMeasures(self.data.object_background, self.lpips, unweighted)
        self.source = Reconstructions(self.first_stage, self.data, self.protocol)
        real = RealImages(self.data, self.extractor, self.reference_folder, self.batch_size, self.track)
        reference = SplitReference(real, self.protocol.reference, self.source.limit, self.protocol.max_bad)
        run = Run(self.source, reference, self.extractor, self.metrics, self.batch_size, self.track)
        self.shown: list[tuple[int, str, str, str]] = []  # of this process: number, files of both images, caption
        seen = run.begin()
        result = run.finish(seen, self._measured)
        of_pairs = {name: asdict(run.marked(score)) for name, score in pair_scores(self.measures).items()}
        shown = sorted(all_items(self.shown))
        return result | {
            "protocol": recorded(self.protocol, seen),
            "model": dict(self.info),
            "perceptual": perceptual_record(self.lpips),
            "scores": of_pairs | result["scores"],
            "images": {
                "samples": [{"file": made, "caption": caption} for _, made, _, caption in shown],
                "real": [{"file": file, "caption": caption} for _, _, file, caption in shown],
                "extras": [],
            },
        }

    def _measured(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same reconstructions, compared with their originals; the first pairs are written for the report."""
        for index, images in stream:
            batch = self.source.batch
            self.measures.update(batch["image"], images)
            for row, number in enumerate(index.tolist()):
                if number < self.protocol.shown:
                    pair = (("reconstruction", images), ("real", batch["image"]))
                    made, file = (save_image(self.out, name, number, part[row]) for name, part in pair)
                    self.shown.append((number, made, file, str(batch.get("caption", batch["key"])[row])))
            yield index, images


# ---- the folder


def recorded(protocol: Protocol, seen: EvaluationPass) -> dict[str, Any]:
    """The protocol for metrics.json, with the options that its scores derived."""
    plain = protocol.as_plain()
    nodes = {name: {**node, **seen.used_options().get(name, {})} for name, node in plain["metrics"].items()}
    return plain | {"metrics": nodes}


def finished(
    out: Path,
    result: dict[str, Any],
    protocol: Protocol,
    paper: Paper,
    began: float,
    write: Callable[[dict[str, Any]], None],  # the first process's further files
) -> dict[str, Any]:
    """Time and place in the paper's table, then metrics.json, whole or not at all and last of all files."""
    result["seconds"] = round(time.monotonic() - began, 1)
    result["paper"] = paper(result)
    if distributed.rank() == 0:
        write(result)
        write_json(out / "metrics.json", result)
    return result


@contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """The folder while one evaluation writes it: another one is refused, a full disk is one sentence, and what a
    refused start created is removed."""
    lock = FileLock(out / ".lock")
    distributed.shared(lambda: _take(out, lock))
    try:
        with disk_errors(out):
            yield
    finally:
        lock.release(remove=True)
        if distributed.rank() == 0 and out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def _take(out: Path, lock: FileLock) -> None:
    check_out(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    if not lock.take():
        raise InputError(
            f"out={out} is being written by another evaluation ({lock.holder()}); wait for it or choose another folder."
        )


def check_out(out: Path) -> None:
    """A folder that holds a finished evaluation is not written over."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file; choose a folder.")
    if (out / "metrics.json").exists():
        raise InputError(f"out={out} already holds an evaluation; choose another folder or delete it.")
