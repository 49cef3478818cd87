"""Evaluation of a model: generate, extract features once, compute metrics, find nearest neighbours, record.

OUT/ metrics.json, images/, curves/. Several processes share the work, and the first one writes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmlab.evaluation.breakdowns import PairedPass, Sweep, by_class, pair_scores, sample_classes
from ldmlab.evaluation.evaluators import Baseline, Evaluator
from ldmlab.evaluation.memorisation import Audit
from ldmlab.evaluation.real_images import Fields, SplitReference, conditions, fields_of
from ldmlab.evaluation.record import (
    all_items,
    copied,
    parameters_record,
    perceptual_record,
    planned,
    save_image,
    throughput,
)
from ldmlab.evaluation.run import Setup
from ldmlab.evaluation.scoring import Numbered
from ldmlab.evaluation.sources import Kept, Reconstructions, Samples
from ldmlab.evaluation.task_part import TaskPart
from ldmlab.inference.model import LoadedModel
from ldmlab.metrics.reconstruction import ReconstructionMeasures


@dataclass
class Evaluation(Setup):
    """Samples of a model, with everything that they are scored by."""

    model: LoadedModel
    extras: Sequence[tuple[str, Path]] = ()  # title, image made elsewhere: sweeps, trajectories
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)  # of protocol.evaluators
    baselines: Mapping[str, Baseline] = field(default_factory=dict)  # of protocol.baselines
    kept: Kept | None = None  # of `Samples`

    def scored(self) -> dict[str, Any]:
        """Processes the reference, then the samples: metrics and all observers."""
        protocol, keep = self.protocol, self.protocol.neighbours > 0 or self.protocol.class_field is not None
        self._prepare()
        reference = SplitReference(self.real_images, protocol.reference, protocol.reference_limit, protocol.max_bad)
        run = self.run_of(self.samples, reference, keep)
        pairs = PairedPass(protocol, self.known, self.extractor, self.lpips) if protocol.pairs else None
        self.real_images.save(self.out, protocol.reference, self.shown["real"])
        seen = self.begun(run)
        other = reference.beside(seen, protocol.also_against) if protocol.also_against else None
        sweep = Sweep(protocol, seen, self.samples)
        shown = [item["number"] for item in self.shown["samples"]]
        task = TaskPart(self, self.evaluators, self.baselines, self.samples, self.known_of, seen, shown)
        self.samples.say_time(self.batch_size, self.samples.count * (1 + sweep.passes) + task.further_images)
        watched = lambda stream: task.watch(self._saved(stream, set(shown)))  # noqa: E731
        result = run.finish(seen, (lambda stream: pairs.watch(watched(stream))) if pairs else watched)
        own = dict(result["scores"])
        result["sampling"] |= throughput(result["sampling"]["images"], self.samples.clock)
        if pairs:
            result["scores"] |= run.marked(pairs.scores())
            result["perceptual"] = perceptual_record(self.lpips)
        if other:
            distance = other.compute((other.total_counts()[0], result["sampling"]["images"]))["fid"]
            titled = replace(distance, title=f"{distance.title}, other split")
            result["scores"] |= run.marked({"fid_other_split": titled})
        result["protocol"] = self.protocol_record(seen)
        result["model"] = {name: value for name, value in self.model.info.items() if name != "spec"}
        result["model"] |= parameters_record(self.model.diffusion)
        result["sweep"] = sweep.run(own, self.batch_size, self.track)
        result["buckets"] = pairs.buckets() if pairs else {}
        result |= task.run()
        if protocol.neighbours:
            audit = Audit(protocol, self.real_images, self.samples, self.out, self.known)
            result["neighbours"] = audit.run(seen, self.shown["samples"])
        if name := protocol.class_field:
            known = fields_of(self.data, protocol.reference, (name,), protocol.reference_limit)
            real = {number: str(one[name]) for number, one in known.items()}
            result["by_class"] = by_class(seen, sample_classes(name, self.samples.requests, self.known), real)
        return result

    def _prepare(self) -> None:
        """All checks that can fail, before an image is read or sampled."""
        protocol = self.protocol
        for changes in ({}, *protocol.combinations()):
            self.model.resolved(protocol.settings(**changes))
        self.known = self._fields(protocol.reference, protocol.reference_limit)
        self.samples = Samples(self.model, protocol, self.known)
        self.samples.kept = self.kept
        count = min(self.samples.count, len(self.known))
        self.shown = planned(self.known, count, min(max(protocol.shown, protocol.neighbours), count))
        self.real_images = self.real()

    def known_of(self, split: str) -> Sequence[Fields]:
        """The fields of a split's images that the model or the protocol reads."""
        return self.known if split == self.protocol.reference else self._fields(split)

    def _fields(self, split: str, limit: int | None = None) -> Sequence[Fields]:
        also = {name for one in self.evaluators.values() for name in getattr(one, "reads", ())}
        also |= {self.protocol.class_field} if self.protocol.class_field else set()
        return conditions(self.data, split, sorted({*self.model.reads, *also}), limit)

    def _saved(self, stream: Iterable[Numbered], shown: set[int]) -> Iterator[Numbered]:
        """The same samples; those of the report are written to files."""
        for index, images in stream:
            for number, image in zip(index.tolist(), images, strict=True):
                if number in shown:
                    save_image(self.out, "sample", number, image)
            yield index, images

    def write_files(self, result: dict[str, Any]) -> None:
        """Images made elsewhere and the curves of runs."""
        extras = copied(self.out, "images/extra_{:02d}", self.extras)
        result["images"] = {kind: self.shown[kind] for kind in ("samples", "real")} | {"extras": extras}
        result["curves"] = copied(self.out, "curves/{}", self.curves.items())


@dataclass
class ReconstructionEvaluation(Setup):
    """PSNR, SSIM, with VGG's weights LPIPS and PSIM, and feature distances of a first stage's reconstructions."""

    model: nn.Module  # the first stage
    info: Mapping[str, Any] = field(default_factory=dict)  # path, weights, step, fingerprint

    @torch.inference_mode()
    def scored(self) -> dict[str, Any]:
        """The record; the first pairs are written for the report."""
        unweighted = None if self.lpips is None else partial(self.lpips, weighted=False)
        self.measures = ReconstructionMeasures(self.data.object_background, self.lpips, unweighted)
        self.source = Reconstructions(self.model, self.data, self.protocol)
        reference = SplitReference(self.real(), self.protocol.reference, self.source.limit, self.protocol.max_bad)
        run = self.run_of(self.source, reference)
        self.pairs: list[tuple[int, str, str, str]] = []  # of this process: number, files of both images, caption
        seen = self.begun(run)
        result = run.finish(seen, self._measured)
        shown = sorted(all_items(self.pairs))
        return result | {
            "protocol": self.protocol_record(seen),
            "model": dict(self.info),
            "perceptual": perceptual_record(self.lpips),
            "scores": run.marked(pair_scores(self.measures)) | result["scores"],
            "images": {
                "samples": [{"file": made, "caption": caption} for _, made, _, caption in shown],
                "real": [{"file": file, "caption": caption} for _, _, file, caption in shown],
                "extras": [],
            },
        }

    def _measured(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same reconstructions, compared with their originals."""
        for index, images in stream:
            batch = self.source.batch
            self.measures.update(batch["image"], images)
            for row, number in enumerate(index.tolist()):
                if number < self.protocol.shown:
                    pair = (("reconstruction", images), ("real", batch["image"]))
                    made, file = (save_image(self.out, name, number, part[row]) for name, part in pair)
                    self.pairs.append((number, made, file, str(batch.get("caption", batch["key"])[row])))
            yield index, images
