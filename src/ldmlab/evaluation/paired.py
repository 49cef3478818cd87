"""Samples against the images that their conditions come from: PSNR, SSIM, LPIPS, and all scores by size of the hole.

As in LaMa's evaluation: the mean of an image's mask decides its bucket [low, high), and a
bucket's Frechet distance rests on that bucket's originals alone.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from ldmlab.contracts import FeatureExtractor
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.real_images import Derived
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Score, described
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.reconstruction import ReconstructionMeasures

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
                    f"{tuple(images.shape[2:])} px (height, width); set data.image_size to the size that is sampled."
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
