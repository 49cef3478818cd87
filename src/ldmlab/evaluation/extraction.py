"""Extraction of training images: samples of each training condition are filtered, then compared with the training set.

Generate and filter (Carlini et al., "Extracting Training Data from Diffusion Models", USENIX Security 2023, section 4):
each distinct condition of the training set is sampled several times with different noise. Samples of one condition
that are nearer than the threshold to each other are joined; a clique of `clique` of them makes the condition a
candidate. A candidate whose medoid is nearer than the threshold to a training image is extracted. The threshold is a
cosine distance, set by held-out images as in `memorisation`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldmlab import distributed
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.shard_data import ShardData
from ldmlab.data.shards import has_manifest
from ldmlab.errors import InputError
from ldmlab.evaluation.memorisation import (
    Nearest,
    Proportion,
    beside_training,
    copies,
    held_out_beside_training,
    largest_clique,
    least_difference,
    medoid,
)
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import Fields, RealImages, SplitReference, conditions
from ldmlab.evaluation.record import FORMAT_VERSION, all_items, features_record, reference_record, save_image
from ldmlab.evaluation.scoring import EvaluationPass, Track, untracked
from ldmlab.evaluation.sources import Samples
from ldmlab.files import write_atomically
from ldmlab.inference.model import LoadedModel
from ldmlab.provenance import provenance

SHOWN = 48  # candidates with images
FEATURES = "features"  # folder of the samples' features, of no use once the record is written
_CHUNK = 256  # samples whose features are on disk before the next ones are made
_RECONSTRUCTED = 200  # training images whose reconstructions should be called copies
_AT_THE_THRESHOLD = 6  # held-out images shown
_TEXTUAL = frozenset({"caption", "class_id"})
_FEWEST = {"held_out": 300, "captions": 100}  # images and conditions below which a warning is given
_SENSITIVE = 0.9  # share of reconstructions called copies, below which the features are weak


@dataclass(frozen=True)
class Extraction:
    """One model's audit; `protocol` holds how samples are made and `copy_quantile`, its `samples` is ignored."""

    model: LoadedModel
    data: ShardData
    extractor: FeatureExtractor
    protocol: Protocol
    out: Path
    each: int  # samples of a condition
    clique: int  # of them that agree
    captions: int | None = None  # distinct conditions, drawn at random; None: all
    batch_size: int = 32
    reference_folder: Path | None = None
    track: Track = untracked

    def run(self) -> dict[str, Any]:
        """The record, on every process; the images of candidates are in `out`."""
        known = self._conditions()
        samples = Samples(self.model, replace(self.protocol, samples=len(known) * self.each), known)
        real = RealImages(self.data, self.extractor, self.reference_folder, self.batch_size, self.track)
        val, train = self._real(real, "val"), self._real(real, "train")
        held_out, places = val.kept(real=True)
        if len(held_out) < 2:
            raise InputError(f"data.val={self.data.val} has no image that can be read, which set the threshold.")
        done = _CHUNK * len(list((self.out / FEATURES).glob("*.safetensors")))
        samples.say_time(self.batch_size, max(samples.count - done, 0))
        features = self._features(samples)
        rebuilt = self._reconstructed()
        found = Nearest(torch.cat([features, held_out, rebuilt]))
        for rows, numbers in zip(train.features[True], train.numbers[True], strict=True):
            found.add(rows, numbers)
        distance, twin, seen = found.together()
        parts = distance.split([len(features), len(held_out), len(rebuilt)])
        threshold = copies(parts[0], parts[1], self.protocol.copy_quantile).bar
        candidates = self._candidates(features, parts[0], twin, threshold, known)
        record = self._record(parts, threshold, candidates, seen, len(known))
        self._count_duplicates(candidates, train, threshold)
        at_bar = (parts[1] - threshold).abs().argsort(stable=True)[:_AT_THE_THRESHOLD].tolist()
        record["at_threshold"] = [(places[n].item(), int(twin[len(features) + n]), float(parts[1][n])) for n in at_bar]
        record["candidate_list"] = candidates
        record["sampling"] = samples.record(len(features))
        return distributed.from_first(self._with_images(record, real, samples))

    # ---- samples and features

    def _conditions(self) -> Sequence[Fields]:
        """The distinct conditions of the training images, in stored order."""
        reads = self.model.reads
        if not reads or reads - _TEXTUAL:
            takes = f"takes {', '.join(sorted(reads))}" if reads else "takes no condition"
            raise InputError(
                f"the audit samples captions or classes again and again, and this model {takes}; find copies among "
                "its samples with `ldmlab evaluate` and protocol.neighbours."
            )
        if not has_manifest(self.data.folder("val", "images")):
            raise InputError(f"data.val={self.data.val} has no images, which set the threshold; give held-out ones.")
        every = conditions(self.data, "train", sorted(reads))
        distinct = list({json.dumps(one, sort_keys=True, default=str): one for one in every}.values())
        if not distinct:
            raise InputError(
                f"data.train={self.data.train} has no image with {', '.join(sorted(reads))}, which it takes; pack "
                "it so."
            )
        if self.captions is None or self.captions >= len(distinct):
            return distinct
        order = torch.randperm(len(distinct), generator=torch.Generator().manual_seed(self.protocol.seed))
        return [distinct[number] for number in sorted(order[: self.captions].tolist())]

    def _features(self, samples: Samples) -> Tensor:
        """(each * conditions, D) of all samples, sample i of condition i % conditions; chunks on disk are kept."""
        folder, total = self.out / FEATURES, samples.count
        starts = range(0, total, _CHUNK)
        for start in self.track(starts, len(starts), f"samples, chunks of {_CHUNK}"):
            path = folder / f"{start:09d}.safetensors"
            if not distributed.shared(path.exists):
                rows = dict(all_items(self._chunk(samples, start)))
                if distributed.rank() == 0:
                    folder.mkdir(parents=True, exist_ok=True)
                    tensor = torch.stack([rows[number] for number in sorted(rows)])
                    write_atomically(path, partial(save_file, {"features": tensor}))
        distributed.barrier()
        files = [folder / f"{start:09d}.safetensors" for start in starts]
        return torch.cat(distributed.shared(lambda: [load_file(file)["features"] for file in files]))

    def _chunk(self, samples: Samples, start: int) -> Iterator[tuple[int, Tensor]]:
        """Numbers and features (D,) of this process's part."""
        requests = samples.requests[start : start + _CHUNK]
        for index, images in samples.share(requests, samples.settings, "", self.batch_size, untracked, start):
            yield from zip(index.tolist(), self.extractor(images)["features"].float().cpu(), strict=True)

    def _real(self, real: RealImages, split: str) -> EvaluationPass:
        """A pass that holds the features of a split, this process's share."""
        seen = EvaluationPass(self.extractor, {}, keep=True)
        SplitReference(real, split, None, self.protocol.max_bad, "--max-bad ").show_to(seen)
        return seen

    def _reconstructed(self) -> Tensor:
        """(N, D) of training images encoded and decoded, which a perfect copy cannot be nearer to."""
        dataset, rows = self.data.val_dataset("images", "train"), []
        step = max(len(dataset) // _RECONSTRUCTED, 1)
        read = (dataset[number] for number in range(0, len(dataset), step)[:_RECONSTRUCTED])
        images = [torch.as_tensor(one["image"]) for one in read if "image" in one]
        for start in range(0, len(images), self.batch_size):
            batch = torch.stack(images[start : start + self.batch_size]).permute(0, 2, 3, 1)
            made = self.model.decode(self.model.encode(batch)).permute(0, 3, 1, 2)
            rows.append(self.extractor(made)["features"].float().cpu())
        return torch.cat(rows)

    # ---- the filter, and what it finds

    def _candidates(
        self, features: Tensor, distance: Tensor, twin: Tensor, threshold: float, known: Sequence[Fields]
    ) -> list[dict[str, Any]]:
        """Conditions whose samples agree, the extracted ones first."""
        found = []
        unit = F.normalize(features.float(), dim=1).view(self.each, len(known), -1)
        for place, condition in enumerate(known):
            own = unit[:, place]
            apart = 1 - own @ own.T
            clique = largest_clique(apart < threshold)
            if len(clique) < self.clique:
                continue
            number = medoid(apart, clique) * len(known) + place
            near = float(distance[number])
            found.append({
                "caption": str(condition.get("caption", condition.get("class_id"))),
                "agree": len(clique),
                "sample": number,
                "twin": int(twin[number]),
                "distance": near,
                "extracted": near < threshold,
            })  # fmt: skip
        return sorted(found, key=lambda one: (not one["extracted"], -one["agree"], one["distance"]))

    def _record(
        self, parts: Sequence[Tensor], threshold: float, candidates: Sequence[Mapping[str, Any]], seen: int, count: int
    ) -> dict[str, Any]:
        """The shares with their intervals, and what weakens them."""
        near = [part < threshold for part in parts]
        extracted = [one for one in candidates if one["extracted"]]
        shares = {
            "copies": Proportion.of_groups(near[0].view(self.each, count).T),
            "held_out_copies": Proportion.of(near[1]),
            "candidates": Proportion.of(torch.arange(count) < len(candidates)),
            "extracted": Proportion.of(torch.arange(count) < len(extracted)),
            "sensitivity": Proportion.of(near[2]),
        }
        excess = least_difference(shares["copies"], shares["held_out_copies"])
        quantiles = torch.linspace(0, 1, 41, dtype=torch.float64)
        distances = [torch.quantile(part.double(), quantiles).tolist() for part in parts[:2]]
        return {
            "format_version": FORMAT_VERSION,
            "model": {name: value for name, value in self.model.info.items() if name != "spec"},
            "training": reference_record(self.data, "train", seen),
            "held_out": reference_record(self.data, "val", len(parts[1])),
            "features": features_record(self.extractor),
            "conditions": count,
            "samples_each": self.each,
            "clique": self.clique,
            "quantile": self.protocol.copy_quantile,
            "threshold": threshold,
            **{name: asdict(share) for name, share in shares.items()},
            "least_excess": excess,
            "exceeds": excess > 0,
            "extracted_images": len({one["twin"] for one in extracted}),
            "distances": dict(zip(("samples", "held_out"), distances, strict=True)),
            "warnings": self._warnings(shares["sensitivity"], len(parts[1]), count),
            "provenance": provenance(),
        }

    def _warnings(self, sensitivity: Proportion, held_out: int, count: int) -> list[str]:
        found = []
        if sensitivity.value < _SENSITIVE:
            found.append(
                f"weak features: only {sensitivity.value:.0%} of training images that the first stage encoded and "
                "decoded are called copies, so that copies are missed"
            )
        if held_out < _FEWEST["held_out"]:
            found.append(f"the threshold rests on {held_out} held-out images, fewer than {_FEWEST['held_out']}")
        if count < _FEWEST["captions"]:
            found.append(f"the shares rest on {count} conditions, fewer than {_FEWEST['captions']}")
        return found

    def _count_duplicates(self, candidates: Sequence[dict[str, Any]], train: EvaluationPass, threshold: float) -> None:
        """Into each shown candidate `duplicates`: training images, itself among them, nearer than the threshold."""
        shown = {one["twin"] for one in candidates[:SHOWN]}
        if not shown:
            return
        rows = F.normalize(torch.cat(train.features[True] or [torch.empty(0, self.extractor.width)]).float(), dim=1)
        numbers = torch.cat(train.numbers[True] or [torch.empty(0, dtype=torch.int64)]).tolist()
        mine = [(number, rows[row]) for row, number in enumerate(numbers) if number in shown]
        of_train = dict(all_items(mine))
        counts = {number: int((1 - rows @ unit < threshold).sum()) for number, unit in of_train.items()}
        everywhere = distributed.gather(counts)
        for one in candidates[:SHOWN]:
            one["duplicates"] = sum(part[one["twin"]] for part in everywhere)

    def _with_images(self, record: dict[str, Any], real: RealImages, samples: Samples) -> dict[str, Any]:
        """The record with the files of the shown candidates and of held-out images at the threshold."""
        if distributed.rank() != 0:
            return record
        shown = record["candidate_list"][:SHOWN]
        files = {
            number: save_image(self.out, "sample", number, image)
            for number, image in samples.again([one["sample"] for one in shown], self.batch_size)
        }
        for one in shown:
            pair = files[one["sample"]], one["caption"], one["twin"], one["distance"]
            one |= beside_training(real, self.out, "sample_file", *pair)
        record["at_threshold"] = [held_out_beside_training(real, self.out, *row) for row in record["at_threshold"]]
        return record
