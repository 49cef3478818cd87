"""Scores of a model that is still being trained: few images, but the pass, the metrics and the record of evaluate.py.

The record carries the tag `in_training` with the step and the number of images, and no comparison takes it in.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.data.shard_data import ShardData
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError
from ldmlab.evaluation.conditions import conditions
from ldmlab.evaluation.protocol import Protocol as ScoreProtocol
from ldmlab.evaluation.protocol import requests
from ldmlab.evaluation.record import FORMAT_VERSION, check_reference, features_record, gathered, reference_record
from ldmlab.evaluation.reference_statistics import ReferenceKey, see_reference
from ldmlab.evaluation.score import EvaluationPass, Numbered, OptionNames, numbered
from ldmlab.inference.model import LoadedModel, generate
from ldmlab.metrics.features import FeatureExtractor
from ldmlab.nn.pixels import to_bytes, to_float
from ldmlab.provenance import provenance

TAG = "in_training"
_TAKEN = frozenset(  # fields of a protocol that mean the same here
    {"name", "reference", "metrics", "samples", "conditions", "classes", "reference_limit", "steps", "eta", "guidance"}
    | {"sampler", "spacing", "seed", "dataset", "feature_network", "reference_rule", "reference_hash", "leaves_open"}
    | {"shown", "paper_table", "paper_row"}  # no report is written, and no table takes these numbers
)
_OPTIONS = OptionNames("callbacks.scores.protocol.metrics", "features@callbacks.scores.features=")


class Source(Protocol):
    """Where the images come from that are set beside real ones."""

    def real_limit(self, protocol: ScoreProtocol) -> int | None: ...  # real images compared with; None: all

    def check(self, protocol: ScoreProtocol, data: ShardData) -> int: ...  # images it will give

    def captions(self) -> Sequence[str] | None: ...  # of those images, where they show one

    def images(
        self, protocol: ScoreProtocol, data: ShardData, batch_size: int, rank: int, world: int
    ) -> Iterable[Numbered]: ...  # this process's share

    def record(self, protocol: ScoreProtocol) -> dict[str, Any]: ...  # how they are made


@dataclass
class InTrainingScorer:
    """Scores what its source gives; `check` before the first step, `score` as often as wanted."""

    source: Source
    data: ShardData  # at the model's size, with its task
    protocol: ScoreProtocol
    extractor: FeatureExtractor
    metrics: Mapping[str, Metric]
    batch_size: int = 32  # images at once
    reference_folder: Path | None = None  # of kept reference statistics; None: real images are looked at every time
    rank: int = 0
    world: int = 1
    count: int = field(default=0, init=False)

    def check(self, device: torch.device) -> frozenset[str]:
        """Names of the scores; all that can be refused is refused now, by a pass with images of noise as samples."""
        _refuse_what_only_evaluate_does(self.protocol)
        check_reference(self.protocol, self.data)
        self.extractor.to(device)  # type: ignore[attr-defined]
        self.count = self.source.check(self.protocol, self.data)
        side = self.data.image_size
        seen, _ = self._beside_real_images()
        mine = torch.arange(self.rank, self.count, self.world)
        for index in mine.split(self.batch_size) if len(mine) else ():
            seen.add(torch.randint(0, 256, (len(index), 3, side, side), dtype=torch.uint8), False, index)
        return frozenset(self._scores(seen)[0])

    def score(self, step: int, model: Mapping[str, Any]) -> dict[str, Any]:
        """A metrics.json with the tag, on every process; `model`: what the record says of it."""
        began = time.monotonic()
        seen, kept = self._beside_real_images()
        share = self.source.images(self.protocol, self.data, self.batch_size, self.rank, self.world)
        seen.add_all(share, real=False)
        scores, counts = self._scores(seen)
        return {
            "format_version": FORMAT_VERSION,
            TAG: {"step": step, "samples": counts[1]},
            "protocol": replace(self.protocol, paper_table=None, paper_row=None).as_plain(),
            "model": {**model, "step": step},
            "sampling": self.source.record(self.protocol) | {"images": counts[1]},
            "reference": reference_record(self.data, self.protocol.reference, counts[0]) | {"kept": kept},
            "features": features_record(self.extractor),
            "scores": {name: _marked(asdict(score), counts[1]) for name, score in scores.items()},
            "buckets": {},
            "images": {"samples": [], "real": [], "extras": []},
            "curves": [],
            "seconds": round(time.monotonic() - began, 1),
            "provenance": provenance(),
            "paper": None,
        }

    def _beside_real_images(self) -> tuple[EvaluationPass, bool]:
        """A pass that has seen the real images, and whether their features were kept from before."""
        for metric in self.metrics.values():
            metric.reset()
        captions = self.source.captions()
        told = captions.__getitem__ if captions else None
        seen = EvaluationPass(self.extractor, self.metrics, captions=told, options=_OPTIONS)
        split, limit = self.protocol.reference, self.source.real_limit(self.protocol)
        key = ReferenceKey.of(self.data, split, limit, self.extractor)
        kept = see_reference(seen, key, self.reference_folder, lambda: self._real(split, limit), self.rank, self.world)
        return seen, kept

    def _real(self, split: str, limit: int | None) -> Iterable[Numbered]:
        return numbered(self.data.eval_loader(split, self.batch_size, self.world, self.rank, limit, kind="images"))

    def _scores(self, seen: EvaluationPass) -> tuple[dict[str, Any], tuple[int, int]]:
        counts = (sum(gathered(seen.counts[True])), sum(gathered(seen.counts[False])))
        scores = seen.compute(counts)
        for metric in self.metrics.values():
            metric.reset()  # features of thousands of images have no place in a training
        return scores, counts


class Samples:
    """Images that a denoiser draws for the conditions of the reference images."""

    def __init__(self, model: LoadedModel) -> None:
        self.model = model
        self._asked: Sequence[Mapping[str, Any]] = ()

    def real_limit(self, protocol: ScoreProtocol) -> int | None:
        """As the protocol says."""
        return protocol.reference_limit

    def check(self, protocol: ScoreProtocol, data: ShardData) -> int:
        """Reads the conditions, once."""
        known = conditions(data, protocol.reference, sorted(self.model.reads), protocol.reference_limit)
        self._asked = requests(protocol, self.model.reads, known)
        self.model.resolved(protocol.settings(), self._asked)
        return len(self._asked)

    def captions(self) -> Sequence[str] | None:
        """Of a model that is told captions."""
        return [str(one["caption"]) for one in self._asked] if "caption" in self.model.reads else None

    def images(
        self, protocol: ScoreProtocol, data: ShardData, batch_size: int, rank: int, world: int
    ) -> Iterable[Numbered]:
        """Sample i has the same noise whatever the step, the batch and the number of processes."""
        shares = generate(self.model, self._asked, protocol.settings(), batch_size=batch_size, rank=rank, world=world)
        for index, drawn in shares:
            yield torch.tensor(index), drawn.permute(0, 3, 1, 2)

    def record(self, protocol: ScoreProtocol) -> dict[str, Any]:
        """The sampler's settings."""
        settings = self.model.resolved(protocol.settings(), self._asked)
        return settings.as_text() | {"conditions": protocol.conditions, "precision": self.model.precision}


class Reconstructions:
    """Reference images that a first stage has encoded and decoded, beside the same images as they are."""

    def __init__(self, first_stage: nn.Module) -> None:
        self.first_stage = first_stage

    def real_limit(self, protocol: ScoreProtocol) -> int | None:
        """The very images that are rebuilt."""
        limits = [limit for limit in (protocol.samples, protocol.reference_limit) if limit is not None]
        return min(limits, default=None)

    def check(self, protocol: ScoreProtocol, data: ShardData) -> int:
        """As many as the split has, at most."""
        total = data.manifest(protocol.reference, "images").total
        return min(total, self.real_limit(protocol) or total)

    def captions(self) -> Sequence[str] | None:
        """None: they were not drawn for a caption."""
        return None

    @torch.no_grad()
    def images(
        self, protocol: ScoreProtocol, data: ShardData, batch_size: int, rank: int, world: int
    ) -> Iterable[Numbered]:
        """By the posterior's mean."""
        limit = self.real_limit(protocol)
        for index, batch in numbered(
            data.eval_loader(protocol.reference, batch_size, world, rank, limit, kind="images")
        ):
            yield index, self._there_and_back(batch)

    def _there_and_back(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) => the same of the reconstruction, on the CPU."""
        device = next(self.first_stage.parameters()).device
        mean = self.first_stage.encode(to_float(images.to(device))).mean  # type: ignore[operator]
        return to_bytes(self.first_stage.decode(mean).float()).cpu()  # type: ignore[operator]

    def record(self, protocol: ScoreProtocol) -> dict[str, Any]:
        """Nothing is drawn."""
        return {"conditions": "reference"}


def _marked(score: dict[str, Any], samples: int) -> dict[str, Any]:
    return {**score, "marks": (*score["marks"], f"scored while training, on {samples} samples")}


def lent(model: LatentDiffusion, image_size: int, precision: str) -> LoadedModel:
    """A latent diffusion model in training, still on the CPU, to sample with; it stays as trainable as it was."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    loaded = LoadedModel(model, image_size, {}, precision)
    for parameter, trainable in wanted:
        parameter.requires_grad_(trainable)
    for module, mode in modes:
        module.training = mode
    return loaded


def _refuse_what_only_evaluate_does(protocol: ScoreProtocol) -> None:
    for item in fields(protocol):
        usual = item.default_factory() if item.default_factory is not MISSING else item.default
        if item.name not in _TAKEN and getattr(protocol, item.name) != usual and _means_more(protocol, item.name):
            raise InputError(
                f"callbacks.scores.protocol.{item.name}={getattr(protocol, item.name)} is for evaluate.py alone; "
                "score with protocol@callbacks.scores.protocol=in_training while training."
            )


def _means_more(protocol: ScoreProtocol, name: str) -> bool:
    """Settings of the category judge say nothing without one."""
    return name not in ("captions_per_category", "category_guidance_scale", "classifier_steps")
