"""The scores of an evaluation broken down: by class, over settings of sampling, by pairs and size of the hole.

By class: kernel distance (unbiased, so a few images suffice), precision and recall of a class's samples against its own
real images; no Frechet distance, which needs thousands. Over settings: the same conditions and seeds everywhere. Pairs:
each sample and the image that its condition comes from, by PSNR, SSIM and LPIPS. As in LaMa's evaluation the mean of an
image's mask decides its bucket [low, high), and a bucket's Frechet distance rests on that bucket's originals alone.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.contracts import FeatureExtractor
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import Derived
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Score, Track, described
from ldmlab.evaluation.sources import Samples
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.kernel import squared_mmd
from ldmlab.metrics.precision_recall import precision_recall
from ldmlab.metrics.reconstruction import ReconstructionMeasures

_NEIGHBOURS = 3  # of precision and recall, as over all classes
_MOST = 4000  # images of one class in its kernel distance, so that memory is bounded


def by_class(
    seen: EvaluationPass,
    generated: Mapping[int, str],  # class by the sample's number
    real: Mapping[int, str],  # by the real image's
) -> list[dict[str, Any]]:
    """One row per class, the worst first, those without a distance last; `seen` must have kept the features."""
    features = {side: _grouped(*seen.kept(real=side), real if side else generated) for side in (True, False)}
    rows = [
        {"class": name, **_scores(features[True].get(name), samples)}
        for name, samples in sorted(features[False].items())
    ]
    return sorted(rows, key=lambda row: torch.inf if row["kid"] is None else -row["kid"])


def _grouped(features: Tensor, numbers: Tensor, names: Mapping[int, str]) -> dict[str, Tensor]:
    """Rows (n, D) by class."""
    places: dict[str, list[int]] = {}
    for place, number in enumerate(numbers.tolist()):
        if number in names:
            places.setdefault(names[number], []).append(place)
    return {name: features[chosen] for name, chosen in places.items()}


def _scores(real: Tensor | None, samples: Tensor) -> dict[str, Any]:
    """None for a score that so few images do not allow."""
    row: dict[str, Any] = {"samples": len(samples), "real": 0 if real is None else len(real)}
    row |= {"kid": None, "precision": None, "recall": None}
    fewest = min(row["samples"], row["real"])
    if real is not None and fewest > 1:
        row["kid"] = float(squared_mmd(samples[:_MOST], real[:_MOST]))
    if real is not None and fewest > _NEIGHBOURS:
        centre = real.mean(dim=0)
        precision, recall = precision_recall(real - centre, samples - centre, _NEIGHBOURS)
        row |= {"precision": float(precision), "recall": float(recall)}
    return row


def sample_classes(
    field: str, conditions: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]
) -> dict[int, str]:
    """Class of each sample by its number: from its conditions, or from the image that they come from."""
    found = {}
    for number, request in enumerate(conditions):
        entry = request if field in request else known[number % len(known)] if len(known) else {}
        if field not in entry:
            raise InputError(
                f"protocol.class_field={field}: samples with protocol.conditions=none belong to no class; leave "
                "protocol.class_field null."
            )
        found[number] = str(entry[field])
    return found


class Sweep:
    """To be made after the real images are processed and before the first sample."""

    def __init__(self, protocol: Protocol, seen: EvaluationPass, samples: Samples) -> None:
        self.protocol, self.samples = protocol, samples
        self.points = protocol.combinations()
        self._fresh = seen.for_other_samples() if self.points else seen

    @property
    def passes(self) -> int:
        """Times that all images are generated, at most."""
        return len(self.points) * self.protocol.sweep_seeds

    def run(self, own: Mapping[str, Any], batch_size: int, track: Track) -> list[dict[str, Any]]:
        """A point for each combination of settings; those of equal settings, and the evaluation's own, share scores."""
        points: list[dict[str, Any]] = []
        known: dict[SampleSettings, dict[str, Any]] = {self.samples.settings: dict(own)}
        for changes in self.points:
            found = []
            for seed in range(self.protocol.seed, self.protocol.seed + self.protocol.sweep_seeds):
                settings = self.samples.model.resolved(
                    self.protocol.settings(**changes, seed=seed), self.samples.requests
                )
                title = ", ".join([*(f"{name} {value}" for name, value in changes.items()), f"seed {seed}"])
                if settings not in known:
                    known[settings] = self._scores(settings, title, batch_size, track)
                found.append(known[settings])
            points.append({**changes, "scores": over_seeds(found)})
        return points

    def _scores(self, settings: SampleSettings, title: str, batch_size: int, track: Track) -> dict[str, Any]:
        seen, samples = self._fresh.for_other_samples(), self.samples
        seen.add_all(samples.share(samples.requests, settings, f"samples at {title}", batch_size, track), real=False)
        return {name: asdict(score) for name, score in seen.compute().items()}


def over_seeds(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of several seeds as mean and sample deviation, with the values; of one seed as they are."""
    if len(found) == 1:
        return dict(found[0])
    scores = {}
    for name, first in found[0].items():
        values = [one[name]["value"] for one in found]
        scores[name] = {**first, "value": mean(values), "spread": stdev(values), "values": values}
    return scores


Perceptual = Callable[[Tensor, Tensor], Tensor]  # LPIPS: two batches in [-1, 1] => (B,)


class Bucket:
    """The images whose hole covers a fraction in [low, high)."""

    def __init__(self, low: float, high: float, extractor: FeatureExtractor, lpips: Perceptual | None) -> None:
        self.low, self.high = low, high
        metrics: dict[str, Metric] = {"fid": FrechetDistance(extractor.width, small_sample=True)}
        self.seen = EvaluationPass(extractor, metrics)
        self.measures = ReconstructionMeasures(None, lpips)

    def add(self, index: Tensor, originals: Tensor, generated: Tensor, share: Tensor) -> None:
        """Add a batch; only images in the bucket are used."""
        inside = (share >= self.low) & (share < self.high)
        if inside.any():
            self.seen.add(originals[inside], True, index[inside])
            self.seen.add(generated[inside], False, index[inside])
            self.measures.update(originals[inside], generated[inside])

    def result(self) -> dict[str, Any]:
        """Its images and scores over all processes; no distance of less than two images."""
        count = self.seen.total_counts()[0]
        scores = pair_scores(self.measures) if count else {}
        scores |= self.seen.compute((count, count)) if count > 1 else {}
        plain = {name: asdict(score) for name, score in scores.items()}
        return {"hole": [self.low, self.high], "images": count, "scores": plain}


class PairedPass:
    """Receives the stream of samples and finds the original of each."""

    def __init__(
        self, protocol: Protocol, known: Any, extractor: FeatureExtractor, lpips: nn.Module | None = None
    ) -> None:
        if not isinstance(known, Derived):
            raise InputError(
                "protocol.pairs compares each sample with the image it was made from, but this model has no task "
                "that starts from an image; set protocol.pairs=false and protocol.mask_buckets={}."
            )
        self._known = known
        distance = None if lpips is None else _on_its_device(lpips)
        self._measures = ReconstructionMeasures(None, distance)
        self._buckets = {
            name: Bucket(low, high, extractor, distance) for name, (low, high) in protocol.mask_buckets.items()
        }

    def watch(self, stream: Iterable[Numbered]) -> Iterator[Numbered]:
        """The same stream of samples uint8 (B, 3, H, W) with their numbers (B,)."""
        for index, generated in stream:
            originals = [self._known.original(number % len(self._known)) for number in index.tolist()]
            images = torch.stack([torch.as_tensor(original["image"]) for original in originals])
            if images.shape != generated.shape:
                raise InputError(
                    f"samples of {tuple(generated.shape[2:])} px cannot be compared with images of "
                    f"{tuple(images.shape[2:])} px (height, width); set protocol.image_size to the size sampled."
                )
            self._measures.update(images, generated)
            if self._buckets:
                if any("mask" not in original for original in originals):
                    raise InputError(
                        "protocol.mask_buckets needs images with a mask; set it to {} for this model's task."
                    )
                holes = [torch.as_tensor(original["mask"]) > 0 for original in originals]
                share = torch.stack([hole.float().mean() for hole in holes])
                for bucket in self._buckets.values():
                    bucket.add(index, images, generated, share)
            yield index, generated

    def scores(self) -> dict[str, Score]:
        """Over all samples of all processes."""
        return pair_scores(self._measures)

    def buckets(self) -> dict[str, Any]:
        """By size of the hole."""
        return {name: bucket.result() for name, bucket in self._buckets.items()}


def pair_scores(measures: ReconstructionMeasures) -> dict[str, Score]:
    """Measures of pairs, with the deviation over images where it is known."""
    found = measures.compute()
    return {
        name: described(Score(value, found.get(f"{name}_std")), name, measures)
        for name, value in found.items()
        if not name.endswith("_std")
    }


def _on_its_device(lpips: nn.Module) -> Perceptual:
    """Input and output are on the CPU, wherever the network is."""
    device = next((tensor.device for tensor in chain(lpips.parameters(), lpips.buffers())), torch.device("cpu"))
    return lambda first, second: lpips(first.to(device), second.to(device)).cpu()
