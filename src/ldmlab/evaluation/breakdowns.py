"""The scores of an evaluation broken down: by class, and over the guidance scale.

By class: kernel distance (unbiased, so a few images suffice), precision and recall of a class's samples against its own
real images; no Frechet distance, which needs thousands. Over the guidance scale: the same conditions and noise, sampled
once for each scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.scoring import EvaluationPass, Track
from ldmlab.evaluation.sources import Samples
from ldmlab.metrics.kernel import squared_mmd
from ldmlab.metrics.precision_recall import precision_recall

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


class GuidanceCurve:
    """To be made after the real images are processed and before the first sample."""

    def __init__(self, scales: Sequence[float], seen: EvaluationPass, samples: Samples) -> None:
        self.scales, self.samples = sorted(set(map(float, scales))), samples
        self._fresh = seen.for_other_samples() if self.scales else seen

    def run(self, own: Mapping[str, Any], batch_size: int, track: Track) -> list[dict[str, Any]]:
        """A point for each scale, in rising order; the evaluation's own scale takes its scores."""
        points = []
        for scale in self.scales:
            scores = dict(own)
            if scale != self.samples.settings.guidance_scale:
                seen, title = self._fresh.for_other_samples(), f"samples at guidance scale {scale:g}"
                settings = replace(self.samples.settings, guidance_scale=scale)
                seen.add_all(self.samples.share(self.samples.requests, settings, title, batch_size, track), real=False)
                scores = {name: asdict(score) for name, score in seen.compute().items()}
            points.append({"guidance_scale": scale, "scores": scores})
        return points
