"""Scores by class on features whose good and bad classes are known."""

import pytest
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.breakdowns import by_class, sample_classes
from ldmlab.evaluation.scoring import EvaluationPass
from ldmlab.metrics.kernel import squared_mmd


class Six:
    """An extractor that is never called."""

    name, weights_hash, width, gives = "six", "0", 6, frozenset({"features"})

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        raise AssertionError


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))


def test_the_class_that_is_drawn_badly_comes_first() -> None:
    seen = EvaluationPass(Six(), {}, keep=True)
    real = {number: ("cat", "dog", "emu")[number % 3] for number in range(300)}
    classes = {number: ("cat", "dog", "fox")[number % 3] for number in range(240)}
    samples = normal(240, 1)
    samples[1::3] += 2  # dogs
    for numbers in torch.arange(300).split(64):
        seen.add_features({"features": normal(300, 0)[numbers]}, True, numbers)
    for numbers in torch.randperm(240, generator=torch.Generator().manual_seed(0)).split(50):
        seen.add_features({"features": samples[numbers]}, False, numbers)
    rows = by_class(seen, classes, real)
    assert [row["class"] for row in rows] == ["dog", "cat", "fox"]  # no real fox: last
    found = {row["class"]: row for row in rows}
    assert found["dog"]["kid"] == pytest.approx(float(squared_mmd(samples[1::3], normal(300, 0)[1::3])), rel=1e-5)
    assert found["dog"]["kid"] > 1
    assert abs(found["cat"]["kid"]) < 0.1
    assert found["dog"]["precision"] < 0.3 < 0.7 < found["cat"]["precision"]
    assert found["fox"] == {"class": "fox", "samples": 80, "real": 0, "kid": None, "precision": None, "recall": None}


def test_the_kernel_distance_is_unbiased_for_sets_of_two_sizes() -> None:
    values = torch.stack([squared_mmd(normal(10, seed), normal(25, seed + 100)) for seed in range(100)])
    assert abs(values.mean()) < 3 * values.std() / 10


def test_classes_are_those_of_the_conditions_or_of_the_images_that_conditions_came_from() -> None:
    assert sample_classes("class_id", [{"class_id": 3}, {"class_id": 1}], []) == {0: "3", 1: "1"}
    known = [{"caption": "x", "kind": "a"}, {"caption": "y", "kind": "b"}]
    assert sample_classes("kind", [{"caption": "x"}, {"caption": "y"}, {"caption": "x"}], known) == {
        0: "a",
        1: "b",
        2: "a",
    }
    with pytest.raises(InputError, match=r"class_field=kind: samples with protocol\.conditions=none"):
        sample_classes("kind", [{}], [])
