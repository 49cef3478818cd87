"""The extrapolated Frechet distance on Gaussians whose true distance is known."""

import pytest
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.metrics.frechet import FrechetDistance, distance_from
from ldmlab.metrics.frechet_limit import PARTS, FrechetLimit

WIDTH = 32
VARIANCE = torch.linspace(1, 0.05, WIDTH, dtype=torch.float64) ** 2
MEAN = torch.full((WIDTH,), 0.1, dtype=torch.float64)


def true_distance() -> float:
    zero = torch.zeros(WIDTH, dtype=torch.float64)
    return float(distance_from(zero, torch.diag(VARIANCE))(MEAN, torch.diag(0.8 * VARIANCE)))


def drawn(count: int, seed: int) -> Tensor:
    noise = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise * (0.8 * VARIANCE).sqrt() + MEAN).float()


def scored(metric: FrechetDistance, samples: Tensor) -> dict[str, float]:
    metric.take_real(torch.zeros(WIDTH, dtype=torch.float64), torch.diag(VARIANCE))
    for part in samples.split(50):
        metric.update(part, real=False)
    return {name: float(value) for name, value in metric.compute().items()}


def test_the_bias_of_few_samples_is_gone_and_its_error_is_told() -> None:
    limits, errors, plain = [], [], []
    for seed in range(12):
        found = scored(FrechetLimit(WIDTH), drawn(400, seed))
        limits.append(found["fid_inf"])
        errors.append(found["fid_inf_std"])
        plain.append(scored(FrechetDistance(WIDTH), drawn(400, seed))["fid"])
    values = torch.tensor(limits)
    bias, plain_bias = abs(values.mean() - true_distance()), abs(torch.tensor(plain).mean() - true_distance())
    assert bias < plain_bias / 8
    spread, told = values.std(), torch.tensor(errors).mean()
    assert 0.5 < told / spread < 2


def test_the_curve_holds_every_size_and_ends_at_the_plain_distance() -> None:
    metric, samples = FrechetLimit(WIDTH, spread=False), drawn(480, 0)
    found = scored(metric, samples)
    assert [point["images"] for point in metric.points] == [480 / parts for parts in PARTS]
    assert metric.points[0]["value"] == pytest.approx(scored(FrechetDistance(WIDTH), samples)["fid"], rel=1e-9)
    values = [point["value"] for point in metric.points]
    assert values == sorted(values)
    assert found["fid_inf"] < values[0]
    assert "fid_inf_std" not in found


def test_order_and_batches_do_not_matter() -> None:
    samples, expected = drawn(300, 3), scored(FrechetLimit(WIDTH), drawn(300, 3))
    metric = FrechetLimit(WIDTH)
    metric.take_real(torch.zeros(WIDTH, dtype=torch.float64), torch.diag(VARIANCE))
    for index in torch.randperm(300, generator=torch.Generator().manual_seed(0)).split(7):
        metric.update(samples[index], real=False, index=index)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(InputError, match="into 12 groups, and 20 are too few"):
        scored(FrechetLimit(WIDTH, small_sample=True), drawn(20, 0))
