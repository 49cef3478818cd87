"""The scores of each class by itself: its samples beside its own real images.

Kernel distance (unbiased, so a few images suffice), precision and recall; no Frechet distance, which needs thousands.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.scoring import EvaluationPass
from ldmlab.metrics.kernel import squared_mmd
from ldmlab.metrics.knn_balls import shares_inside, squared_radii

_NEIGHBOURS = 3  # of precision and recall, as over all classes
_MOST = 4000  # images of one class that its kernel distance looks at, so that memory is bounded


def by_class(
    seen: EvaluationPass,
    asked: Mapping[int, str],  # class by the sample's number
    real: Mapping[int, str],  # by the real image's
) -> list[dict[str, Any]]:
    """A row a class, the worst first, those without a distance last; `seen` has kept the features."""
    features = {side: _grouped(*seen.kept(real=side), real if side else asked) for side in (True, False)}
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
    """None for a score that so few images cannot give."""
    row: dict[str, Any] = {"samples": len(samples), "real": 0 if real is None else len(real)}
    row |= {"kid": None, "precision": None, "recall": None}
    if real is None:
        return row
    if min(len(real), len(samples)) > 1:
        row["kid"] = float(squared_mmd(samples[:_MOST], real[:_MOST]))
    if min(len(real), len(samples)) > _NEIGHBOURS:
        centre = real.mean(dim=0)
        real, samples = real - centre, samples - centre
        balls = [squared_radii(part, _NEIGHBOURS) for part in (samples, real)]
        precision, recall = shares_inside(samples, balls[0], real, balls[1])
        row |= {"precision": float(precision), "recall": float(recall)}
    return row


def asked_classes(field: str, asked: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]]) -> dict[int, str]:
    """Class of each sample by its number: what it was asked for, or what the image is whose conditions it took."""
    found = {}
    for number, request in enumerate(asked):
        entry = request if field in request else known[number % len(known)] if len(known) else {}
        why = "samples drawn with protocol.conditions=none belong to no class; leave protocol.class_field null."
        found[number] = class_of(entry, field, why)
    return found


def class_of(entry: Mapping[str, Any], field: str, why: str) -> str:
    """A sample's or an image's class as text; `why` one may have none, and the way out."""
    if field not in entry:
        raise InputError(f"protocol.class_field={field}: {why}")
    return str(entry[field])
