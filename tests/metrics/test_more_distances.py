"""sFID, density and coverage, CMMD, CLIP score and the spread of FID against sums written out here."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics import features
from ldmlab.metrics.clip_scores import ClipDistance, ClipScore
from ldmlab.metrics.frechet import FrechetDistance, SpatialFrechetDistance, add_outer, whole
from ldmlab.metrics.precision_recall import DensityCoverage


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def numpy_frechet(real: np.ndarray, fake: np.ndarray) -> float:
    """By scipy's root of the product, as ADM's and torch-fidelity's first versions have it."""
    cov_1, cov_2 = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = linalg.sqrtm(cov_1 @ cov_2).real
    gap = real.mean(0) - fake.mean(0)
    return float(gap @ gap + np.trace(cov_1) + np.trace(cov_2) - 2 * np.trace(root))


def fed(metric: Any, real: Tensor, fake: Tensor, batch: int = 17) -> dict[str, float]:
    for rows, is_real in ((real, True), (fake, False)):
        for part in rows.split(batch):
            metric.update(part, real=is_real)
    return {name: float(value) for name, value in metric.compute().items()}


def test_spatial_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmlab.metrics.frechet.SPATIAL_WIDTH", 21)
    real, fake = normal(120, 21, 0), 1.3 * normal(90, 21, 1) + 0.2
    values = fed(SpatialFrechetDistance(), real, fake)
    assert values == {"sfid": pytest.approx(numpy_frechet(real.double().numpy(), fake.double().numpy()), rel=1e-8)}
    with pytest.raises(InputError, match=r"metric\.sfid\.small_sample=true"):
        fed(SpatialFrechetDistance(), real, fake[:20])


def test_outer_products_are_added_in_blocks_of_which_half_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmlab.metrics.frechet._BLOCK", 8)
    real, fake = normal(120, 21, 0), 1.3 * normal(90, 21, 1) @ normal(21, 21, 2)
    values = fed(FrechetDistance(21), real, fake)
    assert values["fid"] == pytest.approx(numpy_frechet(real.double().numpy(), fake.double().numpy()), rel=1e-8)
    outer = torch.zeros(21, 21, dtype=torch.float64)
    add_outer(outer, fake.double())
    assert torch.allclose(whole(outer), fake.double().T @ fake.double(), rtol=1e-12)
    assert outer[20, 0] == 0  # which is the work that is spared


def test_the_real_width_of_spatial_features() -> None:
    assert SpatialFrechetDistance().width == features.SPATIAL_WIDTH == 2023


def test_density_and_coverage() -> None:
    real, fake, k = normal(1100, 3, 2), 0.8 * normal(1300, 3, 3), 5
    x, y = real.double().numpy(), fake.double().numpy()
    own = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1))
    radius = np.sort(own, axis=1)[:, k]  # column 0 is the point itself
    inside = np.sqrt(((x[:, None] - y[None]) ** 2).sum(-1)) < radius[:, None]
    values = fed(DensityCoverage(k), real, fake)
    assert values["density"] == pytest.approx(inside.sum() / (k * len(y)), rel=1e-5)
    assert values["coverage"] == pytest.approx(inside.any(axis=1).mean(), rel=1e-3)


def test_a_collapsed_generator_is_dense_and_covers_little() -> None:
    values = fed(DensityCoverage(), normal(500, 8, 0), 0.05 * normal(500, 8, 1))
    assert values["density"] > 1
    assert values["coverage"] < 0.3
    same = fed(DensityCoverage(), normal(500, 8, 0), normal(500, 8, 1))
    assert 0.8 < same["density"] < 1.2
    assert same["coverage"] > 0.9


def test_cmmd() -> None:
    real, fake = normal(1100, 12, 4), 5 * normal(70, 12, 5) + 0.5
    x, y = (
        part / np.linalg.norm(part, axis=1, keepdims=True) for part in (real.double().numpy(), fake.double().numpy())
    )

    def mean_kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / (2 * 10.0**2)).mean())

    expected = 1000 * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))
    assert expected > 0.1
    assert fed(ClipDistance(), real, fake)["cmmd"] == pytest.approx(expected, rel=1e-5)
    assert fed(ClipDistance(), real, real)["cmmd"] == pytest.approx(0, abs=1e-9)


def test_clip_score() -> None:
    images, texts = normal(50, 8, 6), normal(50, 8, 7)
    metric = ClipScore()
    metric.update(clip=normal(9, 8, 0), real=True)
    for start in range(0, 50, 20):
        metric.update(clip=images[start : start + 20], text=3 * texts[start : start + 20])
    cosine = [
        max(float(a @ b / np.sqrt((a @ a) * (b @ b))), 0) for a, b in zip(images.numpy(), texts.numpy(), strict=True)
    ]
    values = metric.compute()
    assert float(values["clip_score"]) == pytest.approx(100 * np.mean(cosine), rel=1e-5)
    assert float(values["clip_score_std"]) == pytest.approx(100 * np.std(cosine) / math.sqrt(50), rel=1e-4)
    with pytest.raises(InputError, match="needs the caption"):
        metric.update(clip=images)
    only_real = ClipScore()
    only_real.update(clip=images, real=True)
    with pytest.raises(InputError, match="nothing to score"):
        only_real.compute()


def test_the_spread_of_fid_is_a_jackknife() -> None:
    real, fake, groups = normal(300, 5, 8), normal(203, 5, 9) + 0.1, 7
    values = fed(FrechetDistance(5, spread_groups=groups), real, fake)
    x, y = real.double().numpy(), fake.double().numpy()
    number = np.arange(len(y)) % groups
    left_out = np.array([numpy_frechet(x, y[number != group]) for group in range(groups)])
    expected = math.sqrt((groups - 1) / groups * ((left_out - left_out.mean()) ** 2).sum())
    assert values["fid"] == pytest.approx(numpy_frechet(x, y), rel=1e-8)
    assert values["fid_std"] == pytest.approx(expected, rel=1e-6)


def test_the_spread_of_fid_is_that_of_repeated_draws() -> None:
    real = normal(4000, 4, 10)
    spreads, distances = [], []
    for seed in range(60):
        values = fed(FrechetDistance(4, spread_groups=10), real, 1.2 * normal(400, 4, 100 + seed) + 0.3, batch=4000)
        spreads.append(values["fid_std"])
        distances.append(values["fid"])
    assert np.mean(spreads) == pytest.approx(np.std(distances), rel=0.35)  # both are known to some 10 %


def test_wrong_options_are_one_sentence() -> None:
    with pytest.raises(InputError, match="spread_groups=1; choose 0"):
        FrechetDistance(4, spread_groups=1)
    with pytest.raises(InputError, match="spread_groups=9 is too many for 2 images"):
        fed(FrechetDistance(2, spread_groups=9), normal(5, 2, 0), normal(2, 2, 1))
    with pytest.raises(InputError, match="sigma=0"):
        ClipDistance(sigma=0)
    with pytest.raises(InputError, match="more than 5 real images"):
        fed(DensityCoverage(5), normal(5, 2, 0), normal(9, 2, 1))
