"""The category part of an evaluation: which captions are drawn, and how the judge's verdicts are written down."""

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.category_classifier import Agreement, CategoryClassifier


def captions_by_category(
    reference: Sequence[Mapping[str, Any]], field: str, count: int, seed: int
) -> list[dict[str, Any]]:
    """`count` different captions of each category, in the order of the categories' names."""
    known: dict[str, dict[str, Mapping[str, Any]]] = defaultdict(dict)
    for sample in reference:
        known[str(sample[field])].setdefault(str(sample.get("caption")), sample)
    chosen: list[dict[str, Any]] = []
    for category in sorted(known):
        captions = list(known[category].values())
        random.Random(f"{seed}/{category}").shuffle(captions)
        chosen += [dict(sample) for sample in captions[:count]]
    return chosen


def labelled(batches: Iterable[Mapping[str, Any]], field: str) -> tuple[Tensor, list[str]]:
    """All images uint8 (N, 3, H, W) of a loader and the value of `field` of each."""
    images, labels = [], []
    for batch in batches:
        if len(batch["key"]):
            images.append(batch["image"])
            labels += [str(value) for value in batch[field]]
    if not images:
        raise InputError(f"no image could be read to learn {field} from.")
    return torch.cat(images), labels


def numbers(labels: Sequence[str], categories: Sequence[str]) -> Tensor:
    """Category names to numbers (N,)."""
    place = {name: number for number, name in enumerate(categories)}
    unknown = sorted({label for label in labels if label not in place})
    if unknown:
        raise InputError(f"category {unknown[0]} is held out but never trained on; pack the data with another split.")
    return torch.tensor([place[label] for label in labels], dtype=torch.int64)


def verdicts(
    judge: CategoryClassifier, held_out: tuple[Tensor, list[str]], samples: tuple[Tensor, list[str]]
) -> tuple[dict[str, Any], Tensor]:
    """The numbers for metrics.json, and which samples are right (N,)."""
    real = judge.agreement(held_out[0], numbers(held_out[1], judge.categories))
    asked = numbers(samples[1], judge.categories)
    drawn = judge.agreement(samples[0], asked)
    table = [_row(name, number, real, drawn) for number, name in enumerate(judge.categories)]
    numbers_found = {
        "held_out_real": real.balanced,
        "samples": drawn.balanced,
        "ratio": drawn.balanced / real.balanced if real.balanced else None,
        "chance": 1 / len(judge.categories),
        "by_category": table,
    }
    return numbers_found, judge.predict(samples[0]) == asked


def _row(name: str, number: int, real: Agreement, drawn: Agreement) -> dict[str, Any]:
    return {
        "category": name,
        "real_right": real.right[number],
        "real": real.asked[number],
        "samples_right": drawn.right[number],
        "samples": drawn.asked[number],
    }
