"""Has the model learned images by heart? Every sample is set beside the training image nearest to it.

The most suspicious pairs are shown, some ordinary ones, and the held-out images that set the threshold, beside the
training images that they are near to.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.drawing import Drawing, Requests
from ldmlab.evaluation.neighbours import Nearest, copies
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import RealImages
from ldmlab.evaluation.record import gathered
from ldmlab.evaluation.score import EvaluationPass
from ldmlab.inference.image_files import save_image

_AT_THE_BAR = 6  # held-out images shown


@dataclass(frozen=True)
class Audit:
    """The memorisation part of an evaluation; `seen` has kept the features of samples and reference."""

    protocol: Protocol
    real: RealImages
    drawing: Drawing
    out: Path
    asked: Requests
    known: Sequence[Mapping[str, Any]]  # conditions of the reference images, for captions

    def run(self, seen: EvaluationPass, shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`neighbours` of metrics.json; `shown`: samples of the report, whose images are there already."""
        drawn, _ = seen.kept(real=False)
        held_out, places = self._held_out(seen)
        found = Nearest(torch.cat([drawn, held_out]))
        for features, numbers in self.real.features("train"):
            found.add(features, numbers)
        distance, twin, trained_on = found.together()
        if trained_on == 0:
            raise InputError("protocol.neighbours needs training images, and none could be read; set it to 0.")
        of_samples, of_held_out = distance[: len(drawn)], distance[len(drawn) :]
        result: dict[str, Any] = {
            "training_images": trained_on,
            "median_distance_samples": float(of_samples.median()),
            **self._calibrated(of_samples, of_held_out),
        }
        count = self.protocol.neighbours
        closest = of_samples.argsort(stable=True)[:count].tolist()
        spread = [int(item["number"]) for item in shown][:: max(len(shown) // count, 1)][:count]
        at_bar = (of_held_out - (result["bar"] or 0)).abs().argsort(stable=True)[:_AT_THE_BAR].tolist()
        there = {int(item["number"]): str(item["file"]) for item in shown}
        if self.real.rank == 0:
            there |= self._drawn_again([number for number in closest if number not in there])
            result["closest"] = [self._pair(n, there[n], int(twin[n]), float(distance[n])) for n in closest]
            result["pairs"] = [self._pair(n, there[n], int(twin[n]), float(distance[n])) for n in spread]
            result["held_out"] = [self._real_pair(places[n], len(drawn) + n, distance, twin) for n in at_bar]
        return gathered(result)[0]

    def _held_out(self, seen: EvaluationPass) -> tuple[Tensor, list[int]]:
        """Features (M, D) of held-out images and their numbers; none where the data has none."""
        if self.protocol.reference == "val":
            features, numbers = seen.kept(real=True)
            return features, numbers.tolist()
        if not (self.real.data.folder("val", "images") / "manifest.json").exists():
            return torch.empty(0, self.real.extractor.width), []
        parts = EvaluationPass(self.real.extractor, {}, keep=True)
        for features, numbers in self.real.features("val"):
            parts.add_said({"features": features}, True, numbers)
        features, numbers = parts.kept(real=True)
        return features, numbers.tolist()

    def _calibrated(self, samples: Tensor, held_out: Tensor) -> dict[str, Any]:
        """What held-out images say about the samples' distances."""
        names = ("copies", "bar", "expected", "error", "held_out_images", "median_distance_held_out")
        if len(held_out) == 0:
            return dict.fromkeys(names)
        told = copies(samples, held_out, self.protocol.copy_quantile)
        values = (told.share, told.bar, told.expected, told.error, len(held_out), float(held_out.median()))
        return dict(zip(names, values, strict=True))

    def _drawn_again(self, numbers: Sequence[int]) -> dict[int, str]:
        """Files of samples that were scored and not kept."""
        again = self.drawing.again(self.asked, self.protocol.settings(), numbers)
        return {number: save_image(self.out, "sample", number, image) for number, image in again}

    def _pair(self, number: int, file: str, twin: int, distance: float) -> dict[str, Any]:
        train = self.real.image("train", twin)
        told = self.known[number % len(self.known)] if len(self.known) else {}
        said = {**told, **self.asked[number]}
        return {
            "sample": file,
            "train": save_image(self.out, "train", twin, train["image"]),
            "caption": _words(said),
            "train_caption": str(train.get("caption", train["key"])),
            "distance": distance,
        }

    def _real_pair(self, number: int, row: int, distance: Tensor, twin: Tensor) -> dict[str, Any]:
        image, train = self.real.image("val", number), self.real.image("train", int(twin[row]))
        return {
            "held_out": save_image(self.out, "held_out", number, image["image"]),
            "train": save_image(self.out, "train", int(twin[row]), train["image"]),
            "caption": str(image.get("caption", image["key"])),
            "train_caption": str(train.get("caption", train["key"])),
            "distance": float(distance[row]),
        }


def _words(said: Mapping[str, Any]) -> str:
    """What a sample was asked for, where it can be said."""
    told: Iterable[Any] = (said[name] for name in ("caption", "class_id") if name in said)
    return str(next(iter(told), ""))
