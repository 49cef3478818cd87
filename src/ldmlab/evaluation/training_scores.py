"""Scores of a model in training: few images, but the run, the metrics and the record of evaluate.py.

The record carries the tag `in_training` with the step and the number of images, and no comparison takes it in.
"""

import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

import torch

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import RealImages, SplitReference
from ldmlab.evaluation.record import check_reference
from ldmlab.evaluation.run import Run
from ldmlab.evaluation.scoring import OptionNames
from ldmlab.evaluation.sources import Source

TAG = "in_training"
OPTIONS = OptionNames("callbacks.scores.protocol.metrics", "features@callbacks.scores.features=")
_TAKEN = frozenset(  # fields of a protocol that mean the same here
    {"name", "reference", "metrics", "samples", "at_most", "conditions", "classes", "reference_limit", "steps", "eta"}
    | {"guidance_scale", "sampler", "spacing", "seed", "dataset", "feature_network", "reference_rule", "reference_hash"}
    | {"max_bad", "leaves_open"}
    | {"shown", "paper_table", "paper_row"}  # no report is written, and no table takes these numbers
)


@dataclass
class TrainingScores:
    """`check` before the first step, `score` as often as needed."""

    protocol: Protocol
    source: Source
    real: RealImages  # at the model's size, with its task
    metrics: Mapping[str, Any]
    limit: int | None = None  # real images compared with; None: all of the split
    count: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        reference = SplitReference(
            self.real, self.protocol.reference, self.limit, self.protocol.max_bad, "callbacks.scores.protocol.max_bad"
        )
        batch_size, track = self.real.batch_size, self.real.track
        extractor = self.real.extractor
        self.run = Run(self.source, reference, extractor, self.metrics, batch_size, track, OPTIONS)

    def check(self, device: torch.device) -> frozenset[str]:
        """Names of the scores; all that can be refused is refused now, by a pass with images of noise as samples."""
        _refuse_what_only_evaluate_does(self.protocol)
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
        seen = self.run.begin()
        result = self.run.finish(seen)
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


def _refuse_what_only_evaluate_does(protocol: Protocol) -> None:
    for item in fields(protocol):
        usual = item.default_factory() if item.default_factory is not MISSING else item.default
        if item.name not in _TAKEN and getattr(protocol, item.name) != usual:
            raise InputError(
                f"callbacks.scores.protocol.{item.name}={getattr(protocol, item.name)} is for evaluate.py alone; "
                "score with protocol@callbacks.scores.protocol=in_training while training."
            )
