"""What a score must do whatever the features: modes, order, batches, processes, memory, bad input."""

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from torchmetrics import MetricCollection

from ldmlab.errors import InputError
from ldmlab.metrics.clip_scores import ClipDistance, ClipScore
from ldmlab.metrics.frechet import FrechetDistance, distance_from
from ldmlab.metrics.inception_score import InceptionScore
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import DensityCoverage, PrecisionRecall, nearest


def normal(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def collection(width: int) -> MetricCollection:
    return MetricCollection(
        {
            "fid": FrechetDistance(width, spread_groups=3),
            "is": InceptionScore(),
            "kid": KernelDistance(subsets=10, subset_size=50),
            "precision_recall": PrecisionRecall(),
            "density_coverage": DensityCoverage(),
            "cmmd": ClipDistance(),
            "clip_score": ClipScore(),
        }
    )


def test_a_collapsed_generator_has_high_precision_and_low_recall() -> None:
    metric = PrecisionRecall(3)
    metric.update(normal(500, 8, 0), real=True)
    metric.update(0.05 * normal(500, 8, 1), real=False)
    values = metric.compute()
    assert values["precision"] > 0.95
    assert values["recall"] < 0.05


def test_frechet_distance_of_known_gaussians() -> None:
    deviation = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    mean = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    value = distance_from(mean, torch.diag(deviation**2))(torch.zeros(3).double(), torch.eye(3).double())
    assert float(value) == pytest.approx(5 + float(((deviation - 1) ** 2).sum()), rel=1e-12)


def test_a_set_is_no_distance_from_itself() -> None:
    features = normal(400, 16, 2)
    metrics = MetricCollection({"fid": FrechetDistance(16), "precision_recall": PrecisionRecall()})
    metrics.update(features=features, real=True)
    metrics.update(features=features, real=False)
    values = metrics.compute()
    assert abs(float(values["fid"])) < 1e-9
    assert values["precision"] == values["recall"] == 1


def test_nearest_in_tiles_equals_all_distances() -> None:
    points, others = normal(50, 5, 3), normal(70, 5, 4)
    distances, indices = nearest(points, others, tile=16)
    exact = torch.cdist(points, others).min(dim=1)
    assert torch.allclose(distances.sqrt(), exact.values, atol=1e-5)
    assert torch.equal(indices, exact.indices)


def images() -> Iterator[dict[str, Any]]:
    """What the metrics are told of ten batches a side."""
    for real, count, seed in ((True, 210, 5), (False, 190, 6)):
        features, clip, text = (normal(count, 12, seed + shift) for shift in (0, 20, 30))
        logits = 3 * normal(count, 7, seed + 10)
        for index in torch.arange(count).split(20):
            seen = {"features": features[index], "logits": logits[index], "clip": clip[index]}
            yield seen | ({} if real else {"text": text[index]}) | {"real": real, "index": index}


def scores(batches: Any) -> dict[str, float]:
    metrics = collection(12)
    for batch in batches:
        metrics.update(**batch)
    return {name: float(value) for name, value in metrics.compute().items()}


def _process(rank: int, folder: str, expected: dict[str, float]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    values = scores(batch for number, batch in enumerate(images()) if number % 2 == rank)
    torch.distributed.destroy_process_group()
    assert values == pytest.approx(expected, rel=1e-10)


@pytest.mark.slow
def test_two_processes_give_the_score_of_one(tmp_path: Path) -> None:
    expected = scores(images())
    assert expected == pytest.approx(scores(reversed(list(images()))), rel=1e-10)
    mp.spawn(_process, args=(str(tmp_path), expected), nprocs=2)


def test_padding_counts_once() -> None:
    batches = list(images())
    assert scores([*batches, batches[-1]])["is"] == pytest.approx(scores(batches)["is"], rel=1e-12)


@pytest.mark.slow
def test_memory_is_the_features_and_one_tile() -> None:
    nearest(normal(2000, 64, 0), normal(2000, 64, 1))  # the libraries' own memory
    metric = PrecisionRecall(3)
    for part in range(2):
        metric.update(normal(6_000, 64, part), real=True)
        metric.update(normal(6_000, 64, part + 5), real=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    metric.compute()
    all_distances_kib = 12_000 * 12_000 * 4 / 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < all_distances_kib / 4


@pytest.mark.parametrize(("real", "fake", "size"), [(30, 40, 30), (2, 900, 2), (150, 120, 100)])
def test_kernel_distance_takes_the_subsets_that_a_small_set_allows(real: int, fake: int, size: int) -> None:
    small, explicit = KernelDistance(at_most=100), KernelDistance(subset_size=size)
    for metric in (small, explicit):
        metric.update(normal(real, 4, 0), real=True)
        metric.update(normal(fake, 4, 1), real=False)
    assert small.compute() == explicit.compute()
    assert small.resolved == {"subset_size": size}
    assert bool(small.remarks) == (size < 100)
    assert not explicit.remarks


def test_bad_input_is_one_sentence() -> None:
    broken = normal(10, 12, 0)
    broken[3, 4] = torch.nan
    with pytest.raises(InputError, match="1 of 10 rows are not finite"):
        FrechetDistance(12).update(broken, real=True)
    with pytest.raises(InputError, match="16 wide where this metric was built for 12"):
        FrechetDistance(12).update(normal(10, 16, 0), real=True)
    few = FrechetDistance(12)
    few.update(normal(11, 12, 0), real=True)
    few.update(normal(11, 12, 0), real=False)
    with pytest.raises(InputError, match="small_sample=true"):
        few.compute()
    allowed = FrechetDistance(12, small_sample=True)
    allowed.update(normal(11, 12, 0), real=True)
    allowed.update(normal(11, 12, 1), real=False)
    assert torch.isfinite(allowed.compute()["fid"])
    kernel = KernelDistance(subset_size=1000)
    kernel.update(normal(30, 4, 0), real=True)
    kernel.update(normal(40, 4, 0), real=False)
    with pytest.raises(InputError, match="subset_size=1000 is more than the 30 real images"):
        kernel.compute()
    no_real = PrecisionRecall()
    no_real.update(normal(30, 4, 0), real=False)
    with pytest.raises(InputError, match="no real images"):
        no_real.compute()
    score = InceptionScore(splits=10)
    score.update(normal(5, 3, 0))
    with pytest.raises(InputError, match="splits=10"):
        score.compute()
