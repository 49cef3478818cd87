"""Memorisation: every sample with the training image nearest to it in feature space.

Distances are cosine distances, 0 .. 2. A sample is called a copy when it is nearer to a training image than all but
the nearest hundredth of validation images are: near-duplicates that exist in the data (variants of one emoji) set the
threshold, not a fixed number. The most suspicious pairs are shown, some ordinary ones, and the validation images that
set the threshold, with the training images that they are near to.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmlab import distributed
from ldmlab.data.shards import has_manifest
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import RealImages
from ldmlab.evaluation.record import save_image
from ldmlab.evaluation.scoring import EvaluationPass
from ldmlab.evaluation.sources import Samples
from ldmlab.metrics.precision_recall import nearest

_AT_THE_BAR = 6  # validation images shown


class Nearest:
    """The nearest training image so far of each point (N, D); no training features are kept."""

    def __init__(self, points: Tensor) -> None:
        self.points = F.normalize(points.float(), dim=1)
        self.distance = torch.full((len(points),), torch.inf)
        self.number = torch.full((len(points),), -1)
        self.seen = 0  # training images of this process

    def add(self, train: Tensor, numbers: Tensor) -> None:
        """Features (B, D) of training images, and their numbers (B,)."""
        self.seen += len(train)
        squared, index = nearest(self.points, F.normalize(train.float(), dim=1))
        distance = squared / 2  # |a - b|^2 = 2 - 2 cos for unit vectors
        nearer = distance < self.distance
        self.distance[nearer] = distance[nearer]
        self.number[nearer] = numbers[index[nearer]]

    def together(self) -> tuple[Tensor, Tensor, int]:
        """Over all processes: distances (N,), numbers (N,) and how many training images there were."""
        shares = distributed.gather((self.distance, self.number, self.seen))
        distances, numbers = torch.stack([s[0] for s in shares]), torch.stack([s[1] for s in shares])
        best, rank = distances.min(dim=0)
        return best, numbers.gather(0, rank[None])[0], sum(share[2] for share in shares)


@dataclass(frozen=True)
class Copies:
    """How many samples are suspiciously near to a training image."""

    bar: float  # distance that a share `quantile` of validation images falls below
    share: float  # of samples below it
    expected: float  # share of samples below it if they were validation images
    error: float  # standard error of `share - expected` if samples were validation images


def copies(samples: Tensor, val: Tensor, quantile: float) -> Copies:
    """From the distances of samples (N,) and of validation images (M,) to the training set."""
    bar = float(torch.quantile(val.double(), quantile))
    error = math.sqrt(quantile * (1 - quantile) * (1 / len(samples) + 1 / len(val)))
    return Copies(bar, float((samples.double() < bar).double().mean()), quantile, error)


@dataclass(frozen=True)
class Audit:
    """The memorisation part of an evaluation; `seen` has kept the features of samples and reference."""

    protocol: Protocol
    real: RealImages
    samples: Samples
    out: Path
    known: Sequence[Mapping[str, Any]]  # conditions of the reference images, for captions

    def run(self, seen: EvaluationPass, shown: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`neighbours` of metrics.json; `shown`: samples of the report, whose images are there already."""
        generated, _ = seen.kept(real=False)
        val, places = self._validation(seen)
        found = Nearest(torch.cat([generated, val]))
        for features, numbers in self.real.features("train"):
            found.add(features, numbers)
        distance, twin, trained_on = found.together()
        if trained_on == 0:
            raise InputError("protocol.neighbours needs training images, and none could be read; set it to 0.")
        of_samples, of_val = distance[: len(generated)], distance[len(generated) :]
        result: dict[str, Any] = {
            "training_images": trained_on,
            "median_distance_samples": float(of_samples.median()),
            **self._calibrated(of_samples, of_val),
        }
        count = self.protocol.neighbours
        closest = of_samples.argsort(stable=True)[:count].tolist()
        spread = [int(item["number"]) for item in shown][:: max(len(shown) // count, 1)][:count]
        at_bar = (of_val - (result["bar"] or 0)).abs().argsort(stable=True)[:_AT_THE_BAR].tolist()
        there = {int(item["number"]): str(item["file"]) for item in shown}
        if distributed.rank() == 0:
            missing = [number for number in closest if number not in there]  # scored and not kept
            for number, image in self.samples.again(missing, self.real.batch_size):
                there[number] = save_image(self.out, "sample", number, image)
            for name, chosen in (("closest", closest), ("pairs", spread)):
                rows = [(there[n], self._caption(n), int(twin[n]), float(distance[n])) for n in chosen]
                result[name] = [beside_training(self.real, self.out, "sample", *row) for row in rows]
            held_out = [(places[n], int(twin[len(generated) + n]), float(of_val[n])) for n in at_bar]
            result["held_out"] = [held_out_beside_training(self.real, self.out, *one) for one in held_out]
        return distributed.from_first(result)

    def _validation(self, seen: EvaluationPass) -> tuple[Tensor, list[int]]:
        """Features (M, D) of validation images and their numbers; none where the data has none."""
        if self.protocol.reference != "val":
            seen = EvaluationPass(self.real.extractor, {}, keep=True)
            there = has_manifest(self.real.data.folder("val", "images"))
            for features, numbers in self.real.features("val") if there else ():
                seen.add_features({"features": features}, True, numbers)
        features, numbers = seen.kept(real=True)
        return features, numbers.tolist()

    def _calibrated(self, samples: Tensor, val: Tensor) -> dict[str, Any]:
        """The samples' distances against those of validation images."""
        names = ("copies", "bar", "expected", "error", "held_out_images", "median_distance_held_out")
        if len(val) == 0:
            return dict.fromkeys(names)
        found = copies(samples, val, self.protocol.copy_quantile)
        values = (found.share, found.bar, found.expected, found.error, len(val), float(val.median()))
        return dict(zip(names, values, strict=True))

    def _caption(self, number: int) -> str:
        """The condition of a sample as text; "" for one that is no text."""
        known = self.known[number % len(self.known)] if len(self.known) else {}
        conditions = {**known, **self.samples.requests[number]}
        return str(conditions.get("caption", conditions.get("class_id", "")))


def beside_training(
    real: RealImages, out: Path, name: str, file: str, caption: str, twin: int, distance: float
) -> dict[str, Any]:
    """An image `file`, entered as `name`, beside the training image nearest to it."""
    train = real.image("train", twin)
    return {
        name: file,
        "train": save_image(out, "train", twin, train["image"]),
        "caption": caption,
        "train_caption": str(train.get("caption", train["key"])),
        "distance": distance,
    }


def held_out_beside_training(real: RealImages, out: Path, place: int, twin: int, distance: float) -> dict[str, Any]:
    """A validation image, saved, beside the training image nearest to it."""
    known = real.image("val", place)
    file, caption = save_image(out, "held_out", place, known["image"]), str(known.get("caption", known["key"]))
    return beside_training(real, out, "held_out", file, caption, twin, distance)


def largest_clique(joined: Tensor) -> list[int]:
    """A largest set of nodes that are all joined, of a symmetric bool (N, N): branch and bound with a pivot.

    A largest clique holds the pivot or a node that is not joined to it (Bron & Kerbosch 1973, Tomita et al. 2006).
    """
    near = [{j for j, there in enumerate(row) if there and j != i} for i, row in enumerate(joined.tolist())]
    best: list[int] = []

    def grow(clique: list[int], left: set[int]) -> None:
        nonlocal best
        if len(clique) > len(best):
            best = clique
        if not left or len(clique) + len(left) <= len(best):
            return
        pivot = max(left, key=lambda node: len(near[node] & left))
        for node in sorted(left - near[pivot]):
            grow([*clique, node], left & near[node])
            left = left - {node}

    grow([], set(range(len(near))))
    return sorted(best)


def medoid(distances: Tensor, among: list[int]) -> int:
    """The one of `among` with the smallest sum of distances (N, N) to the others."""
    chosen = torch.tensor(among)
    return among[int(distances[chosen][:, chosen].sum(dim=1).argmin())]


_Z = 1.959964  # 97.5 % of the normal distribution


@dataclass(frozen=True)
class Proportion:
    """A proportion with Wilson's score interval (1927), which is no point at 0 and 1."""

    value: float
    low: float
    high: float
    count: float  # independent trials behind it

    @classmethod
    def of(cls, hits: Tensor) -> "Proportion":
        """Of independent trials, bool (N,)."""
        return cls._made(float(hits.double().mean()), len(hits))

    @classmethod
    def of_groups(cls, hits: Tensor) -> "Proportion":
        """Of trials in groups, bool (groups, each): n = p (1 - p) / Var, within groups .. groups * each.

        The effective number of trials of Korn & Graubard (1998); where all groups agree, it is that of the groups.
        """
        groups, each = hits.shape
        means = hits.double().mean(dim=1)
        value = float(means.mean())
        variance = float(means.var()) / groups if groups > 1 else 0.0
        count = value * (1 - value) / variance if variance > 0 else groups
        return cls._made(value, min(max(count, groups), groups * each))

    @classmethod
    def _made(cls, p: float, n: float) -> "Proportion":
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * (p * (1 - p) / n + _Z**2 / (4 * n**2)) ** 0.5
        return cls(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), n)


def least_difference(a: Proportion, b: Proportion) -> float:
    """Lower end of the 95 % interval of a - b (Newcombe 1998, method 10)."""
    return a.value - b.value - ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
