"""Score a model by a protocol: draw, look once with one extractor, judge, find neighbours, write it all down.

OUT/ metrics.json, report.md, report.html, pictures/, curves/. Several processes share the drawing and the looking.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.album import copy_curves, copy_pictures, planned, readable, save_picture
from ldmlab.evaluation.category_score import CategoryScore
from ldmlab.evaluation.conditions import conditions
from ldmlab.evaluation.generate import generate
from ldmlab.evaluation.model import LoadedModel
from ldmlab.evaluation.neighbours import nearest_training_pictures
from ldmlab.evaluation.paired import PairedPass
from ldmlab.evaluation.protocol import Protocol, requests
from ldmlab.evaluation.record import (
    FORMAT_VERSION,
    all_items,
    check_reference,
    features_record,
    gathered,
    paper_record,
    reference_record,
    throughput,
    timed,
)
from ldmlab.evaluation.reference_statistics import ReferenceKey, against_other_split, see_reference
from ldmlab.evaluation.report import write_report
from ldmlab.evaluation.score import EvaluationPass, Numbered, numbered
from ldmlab.evaluation.task_evidence import Baseline, Judge
from ldmlab.evaluation.task_part import task_part
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.provenance import provenance

T = TypeVar("T")
Track = Callable[[Iterable[T], int, str], Iterable[T]]  # (items, how many, title) => the same items, shown


@dataclass
class Evaluation:
    """All that a score is made from; `run` does it once."""

    model: LoadedModel
    data: ShardData
    protocol: Protocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    out: Path
    batch_size: int = 64  # pictures at once
    rank: int = 0
    world: int = 1
    curves: Mapping[str, Path] = field(default_factory=dict)  # title => metrics.csv of a run
    extras: Sequence[tuple[str, Path]] = ()  # title, picture made elsewhere: sweeps, strips
    lpips: nn.Module | None = None  # for protocol.pairs
    judges: Mapping[str, Judge] = field(default_factory=dict)  # of protocol.judges
    baselines: Mapping[str, Baseline] = field(default_factory=dict)  # of protocol.baselines
    reference_folder: Path | None = None  # of kept reference statistics; None: none are kept
    track: Track = lambda items, count, title: items
    clock: list[float] = field(default_factory=list)  # seconds that each batch of samples took

    def run(self) -> dict[str, Any]:
        """The content of metrics.json (on every process); the first process writes the files."""
        began = time.monotonic()
        check_out(self.out)
        check_reference(self.protocol, self.data)
        settings = self.model.resolved(self.protocol.settings())
        known = self._known(self.protocol.reference, self.protocol.reference_limit)
        asked = requests(self.protocol, self.model.reads, known)
        captions = (lambda number: str(asked[number]["caption"])) if "caption" in self.model.reads else None
        seen = EvaluationPass(self.extractor, self.metrics, keep=self.protocol.neighbours > 0, captions=captions)
        album = self._album(known)
        pairs = PairedPass(self.protocol, known, self.extractor, self.lpips) if self.protocol.pairs else None
        kept = self._see_reference(seen, album)
        other = self._against(self.protocol.also_against, seen) if self.protocol.also_against else None
        task = task_part(self, known, asked, seen, [item["number"] for item in album["samples"]])
        drawn = task.watch(self._drawn(asked, album))
        seen.add_all(pairs.watch(drawn) if pairs else drawn, real=False)
        counts = (sum(gathered(seen.counts[True])), sum(gathered(seen.counts[False])))
        scores = seen.compute(counts) | (pairs.scores() if pairs else {})
        if other:
            scores["fid_other_split"] = other.compute((sum(gathered(other.counts[True])), counts[1]))["fid"]
        result: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "protocol": self.protocol.as_plain(),
            "model": {name: value for name, value in self.model.info.items() if name != "spec"},
            "sampling": settings.as_text()
            | {"pictures": counts[1], "conditions": self.protocol.conditions}
            | throughput(counts[1], self.clock),
            "reference": reference_record(self.data, self.protocol.reference, counts[0]) | {"kept": kept},
            "features": features_record(self.extractor),
            "scores": {name: asdict(score) for name, score in scores.items()},
            "buckets": pairs.buckets() if pairs else {},
        } | task.run()
        if self.protocol.neighbours:
            result["neighbours"] = self._neighbours(seen, asked, album)
        if self.protocol.category_field:
            result["categories"] = self._categories(known)
        result["seconds"] = round(time.monotonic() - began, 1)
        result["provenance"] = provenance()
        result["paper"] = paper_record(result)
        if self.rank == 0:
            self._write(result, album)
        return result

    # ---- reading

    def _known(self, split: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Conditions and category of every picture of a split."""
        fields = sorted(self.model.reads | ({self.protocol.category_field} if self.protocol.category_field else set()))
        return conditions(self.data, split, fields, limit)

    def _loader(self, split: str, limit: int | None = None) -> Iterable[dict[str, Any]]:
        """This process's share of a split's pictures."""
        total = self.data.manifest(split, "images").total
        batches = -(-min(total, limit or total) // (self.batch_size * self.world))
        loader = self.data.eval_loader(split, self.batch_size, self.world, self.rank, limit, kind="images")
        return self.track(loader, batches, f"real pictures ({split})")

    def _see_reference(self, seen: EvaluationPass, album: dict[str, list[dict[str, Any]]]) -> bool:
        """The real pictures to the scores, by kept features where they suffice; those of the report to its folder."""
        split, limit = self.protocol.reference, self.protocol.reference_limit
        if self.rank == 0:
            dataset = self.data.held_out_dataset("images", split)
            for item in album["real"]:
                save_picture(self.out, "real", item["number"], readable(dataset, len(dataset), item["number"]))
        key = ReferenceKey.of(self.data, split, limit, self.extractor)
        return see_reference(
            seen, key, self.reference_folder, lambda: numbered(self._loader(split, limit)), self.rank, self.world
        )

    def _against(self, split: str, seen: EvaluationPass) -> EvaluationPass:
        key = ReferenceKey.of(self.data, split, None, self.extractor)
        folder, rank, world = self.reference_folder, self.rank, self.world
        return against_other_split(seen, key, folder, lambda: numbered(self._loader(split)), rank, world)

    # ---- drawing

    def _drawn(self, asked: Sequence[Mapping[str, Any]], album: dict[str, list[dict[str, Any]]]) -> Iterable[Numbered]:
        shown = {item["number"] for item in album["samples"]}
        for index, pictures in timed(self._generated(asked, self.protocol.settings(), 0, "samples"), self.clock):
            for number, picture in zip(index.tolist(), pictures, strict=True):
                if number in shown:
                    save_picture(self.out, "sample", number, picture)
            yield index, pictures

    def _generated(
        self, asked: Sequence[Mapping[str, Any]], settings: Any, first: int, title: str
    ) -> Iterable[Numbered]:
        """Numbered pictures uint8 (B, 3, H, W) of this process's share."""
        stream = generate(
            self.model,
            asked,
            settings,
            batch_size=self.batch_size,
            rank=self.rank,
            world=self.world,
            first_index=first,
        )
        share = len(range(self.rank, len(asked), self.world))
        for index, pictures in self.track(stream, -(-share // self.batch_size), title):
            yield torch.tensor(index), pictures.permute(0, 3, 1, 2)

    def _album(self, known: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        count = min(self.protocol.samples or len(known), len(known))
        return planned(known, count, min(max(self.protocol.shown, self.protocol.neighbours), count))

    # ---- what else is said about the samples

    def _neighbours(
        self, seen: EvaluationPass, asked: Sequence[Mapping[str, Any]], album: dict[str, list[dict[str, Any]]]
    ) -> dict[str, Any]:
        held_out = self.protocol.reference != "train"
        features: list[Tensor] = []
        places: list[int] = []
        for index, pictures in numbered(self._loader("train")):
            features.append(self.extractor(pictures)["features"].float().cpu())
            places += index.tolist()
        train, positions = torch.cat(gathered(torch.cat(features))), all_items(places)
        real = torch.cat(gathered(torch.cat(seen.features[True])))
        order = all_items(range(self.rank, len(asked), self.world))
        drawn = torch.cat(gathered(torch.cat(seen.features[False])))[torch.tensor(order).argsort()]
        found = nearest_training_pictures(drawn, real if held_out else drawn, train)
        dataset = self.data.held_out_dataset("images", "train")
        pairs = []
        stride = max(len(album["samples"]) // self.protocol.neighbours, 1)
        for item in album["samples"][::stride][: self.protocol.neighbours]:
            number = item["number"]
            twin = dataset[positions[int(found.index[number])]]
            pairs.append(
                {
                    "sample": item["file"],
                    "train": save_picture(self.out, "train", number, torch.as_tensor(twin["image"])),
                    "caption": item["caption"],
                    "train_caption": str(twin.get("caption", twin["key"])),
                    "distance": float(found.distance[number]),
                }
            )
        return {
            "copies": found.copies if held_out else None,
            "bar": found.bar if held_out else None,
            "median_distance_samples": found.typical_sample,
            "median_distance_held_out": found.typical_held_out if held_out else None,
            "training_pictures": len(train),
            "pairs": pairs,
        }

    def _categories(self, known: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        protocol = self.protocol
        steps = range(protocol.classifier_steps)
        ticks = iter(self.track(steps, len(steps), "the category judge learns"))
        part = CategoryScore(protocol, self._drawn_whole, self._saved, self._batches, lambda: next(ticks, None))
        found = part.run(known, self._known("train", None))
        next(ticks, None)
        return found

    def _drawn_whole(self, asked: Sequence[Mapping[str, Any]], first: int) -> Tensor:
        """The pictures of all processes in order, uint8 (N, 3, H, W)."""
        stream = self._generated(asked, self.protocol.settings(self.protocol.category_guidance), first, "by category")
        mine = [(int(i), picture) for index, part in stream for i, picture in zip(index, part, strict=True)]
        return torch.stack([picture for _, picture in sorted(all_items(mine), key=itemgetter(0))])

    def _saved(self, name: str, number: int, picture: Tensor) -> str:
        return save_picture(self.out, name, number, picture) if self.rank == 0 else ""

    def _batches(self, split: str) -> Iterable[dict[str, Any]]:
        """All pictures of a split with their category, on every process."""
        fields = tuple(dict.fromkeys((*self.data.fields, str(self.protocol.category_field))))
        return replace(self.data, fields=fields).eval_loader(split, 256, kind="images")

    # ---- writing

    def _write(self, result: dict[str, Any], album: dict[str, list[dict[str, Any]]]) -> None:
        result["pictures"] = {kind: album[kind] for kind in ("samples", "real")}
        result["pictures"]["extras"] = copy_pictures(self.out, self.extras)
        result["curves"] = copy_curves(self.out, self.curves)
        (self.out / "metrics.json").write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
        write_report(self.out)


def check_out(out: Path) -> None:
    """A folder that holds a finished evaluation is not written over."""
    if (out / "metrics.json").exists():
        raise InputError(f"out={out} already holds an evaluation; choose another folder or delete it.")
