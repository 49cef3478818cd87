"""Retrieval: known answers."""

import pytest
import torch
from torch.nn import functional as F

from ldmlab.metrics.clip_scores import retrieval


def unit(rows: int, width: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_perfect_pairs() -> None:
    features = unit(120, 32, 0)
    got = retrieval(features, features, [str(i) for i in range(120)])
    assert got["recall_1_of_50"] == got["recall_1_of_all"] == 1
    assert got["similarity_matched"] == pytest.approx(1)
    assert got["chance_recall_1_of_50"] == pytest.approx(1 / 50)
    assert got["chance_recall_5_of_50"] == pytest.approx(5 / 50)


def test_strangers_score_as_chance() -> None:
    captions = [str(i) for i in range(400)]
    got = retrieval(unit(400, 32, 0), unit(400, 32, 1), captions)
    assert got["recall_5_of_50"] == pytest.approx(got["chance_recall_5_of_50"], abs=0.03)
    assert abs(got["similarity_matched"]) < 0.05


def test_directions() -> None:
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0, 0], [0.9, 1, 0], [0.9, 0, 0.1]]), dim=1)
    got = retrieval(images, texts, ["a", "b", "c"])
    assert got["image_to_text_recall_1_of_all"] == 1
    assert got["text_to_image_recall_1_of_all"] == pytest.approx(2 / 3)
    assert got["recall_1_of_50"] == pytest.approx(5 / 6)  # fewer pairs than candidates: all of them


def test_the_same_words_are_found_too() -> None:
    images = torch.eye(4)
    texts = images[[1, 0, 2, 3]]
    got = retrieval(images, texts, ["twin", "twin", "c", "d"])
    assert got["recall_1_of_all"] == 1
    assert got["chance_recall_1_of_all"] == pytest.approx((0.5 + 0.5 + 0.25 + 0.25) / 4)
