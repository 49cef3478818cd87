"""Samples learned by heart are found; fresh ones are not accused."""

import pytest
import torch
from torch import Tensor

from ldmlab.evaluation.memorisation import Copies, Nearest, copies


def normal(count: int, seed: int) -> Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


TRAIN, HELD_OUT = normal(500, 0), normal(300, 1)


def audited(samples: Tensor) -> tuple[Copies, Tensor]:
    found = Nearest(torch.cat([samples, HELD_OUT]))
    for numbers in torch.randperm(500, generator=torch.Generator().manual_seed(2)).split(64):
        found.add(TRAIN[numbers], numbers)
    distance, number, seen = found.together()
    assert seen == 500
    return copies(distance[: len(samples)], distance[len(samples) :], 0.01), number[: len(samples)]


def test_copies_are_found() -> None:
    found, number = audited(TRAIN[:100] * 1.5 + 0.01 * normal(100, 3))  # length does not matter
    assert found.share > 0.95
    assert found.share - found.expected > 10 * found.error
    assert torch.equal(number, torch.arange(100))


def test_fresh_samples_are_not_accused() -> None:
    shares = [audited(normal(100, seed))[0] for seed in range(10, 20)]
    mean = sum(found.share for found in shares) / len(shares)
    assert abs(mean - 0.01) < 3 * shares[0].error
    assert shares[0].error == pytest.approx((0.01 * 0.99 * (1 / 100 + 1 / 300)) ** 0.5)


def test_the_nearest_is_the_nearest_of_all() -> None:
    points = normal(20, 4)
    found = Nearest(points)
    for numbers in torch.arange(500).split(7):
        found.add(TRAIN[numbers], numbers)
    cosine = torch.nn.functional.cosine_similarity(points[:, None], TRAIN[None], dim=2)
    assert torch.equal(found.together()[1], cosine.argmax(dim=1))
    assert torch.allclose(found.together()[0], 1 - cosine.amax(dim=1), atol=1e-5)
