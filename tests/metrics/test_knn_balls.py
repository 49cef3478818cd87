"""Balls in tiles and by screening against all distances at once, in double precision."""

import pytest
import torch
from torch import Tensor

from ldmlab.metrics import knn_balls
from ldmlab.metrics.knn_balls import Block, Points, Space, shares_inside, squared_radii
from ldmlab.metrics.precision_recall import PrecisionRecall


def normal(count: int, seed: int, width: int = 40) -> Tensor:
    """Rows of different lengths, so that one bound for all would be loose."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * (1 + torch.rand(count, 1, generator=generator))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn_balls, "_TILE", 32)
    monkeypatch.setattr(knn_balls, "_STEP", 8)


@pytest.mark.parametrize("screening", [False, True])
def test_ball_sizes(screening: bool) -> None:
    points = normal(150, 0)
    exact = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf).square().sort(dim=1).values
    for neighbours in (1, 3, 40):  # more than a tile holds
        found = squared_radii(points, neighbours, screening)
        assert torch.allclose(found.double(), exact[:, neighbours - 1], rtol=1e-5)


@pytest.mark.parametrize("screening", [False, True])
@pytest.mark.parametrize("shift", [0.0, 0.6, 5.0])
def test_shares_inside(screening: bool, shift: float) -> None:
    a, b = normal(170, 1) + shift, normal(130, 2)
    distances = torch.cdist(a.double(), b.double()).square()
    ball_a, ball_b = squared_radii(a, 3), squared_radii(b, 3)
    precision, recall = shares_inside(a, ball_a, b, ball_b, screening)
    assert precision == (distances <= ball_b.double()).any(dim=1).double().mean()
    assert recall == (distances <= ball_a.double()[:, None]).any(dim=0).double().mean()


def test_screening_never_rules_out_what_is_near() -> None:
    for scale, seed in ((1e-3, 3), (1.0, 4), (1e3, 5)):
        a, b = scale * normal(60, seed, 300), scale * normal(50, seed + 10, 300)
        b[:30] = a[:30] + 0.01 * scale * normal(30, seed + 20, 300)  # close pairs
        known = Points.of(a, screening=True)
        block = Block(known, Points.of(b, screening=True), Space(60, known))
        lower = block.bounds()
        upper = block.upper_bounds(lower)
        exact = torch.cdist(a.double(), b.double()).square()
        assert (lower.double() <= exact).all()
        assert (upper.double() >= exact).all()
        assert (upper - lower).mean() < 0.1 * exact.mean()  # and is not empty talk


def test_screening_holds_where_features_are_beyond_the_reach_of_8_bits() -> None:
    points = normal(90, 9, 200) ** 5  # most near 0, some twenty times the root mean square
    known = Points.of(points, screening=True)
    assert known.low is not None
    assert points.abs().max() > 128 * known.low.scale  # and is cut
    block = Block(known, known, Space(90, known))
    exact = torch.cdist(points.double(), points.double()).square()
    assert (block.bounds().double() <= exact).all()
    assert (block.upper_bounds(block.bounds()).double() >= exact).all()
    assert torch.allclose(squared_radii(points, 3, screening=True), squared_radii(points, 3), rtol=1e-4)


def test_twins_are_at_no_distance() -> None:
    points = normal(70, 6).repeat(2, 1)
    for screening in (False, True):
        assert squared_radii(points, 1, screening).abs().max() < 1e-4
        assert squared_radii(0 * points, 1, screening).abs().max() == 0


def test_both_ways_score_alike() -> None:
    found = []
    for screening in (False, True):
        metric = PrecisionRecall(3, screening)
        metric.update(normal(200, 7), real=True)
        metric.update(normal(180, 8) * 0.9, real=False)
        found.append({name: float(value) for name, value in metric.compute().items()})
    assert found[0] == found[1]
    assert found[0]["precision_std"] == pytest.approx(
        (found[0]["precision"] * (1 - found[0]["precision"]) / 180) ** 0.5
    )
