"""Our arithmetic on fixed features against the numbers torch-fidelity 0.4.0 computed from them."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.inception_score import InceptionScore
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall

ASSETS = Path(__file__).parents[1] / "assets" / "reference" / "metrics"
EXPECTED = json.loads((ASSETS / "expected.json").read_text())
FEATURES = load_file(ASSETS / "features.safetensors")
RELATIVE = 1e-3  # torch-fidelity works in float32 where we use float64; KID: 50 subsets of 200, seed 0


def fed(metric: Any, batch: int = 64) -> Any:
    for features, real in ((FEATURES["real_features"], True), (FEATURES["fake_features"], False)):
        for part in features.split(batch):
            metric.update(part, real=real)
    return metric


def test_frechet_distance() -> None:
    value = fed(FrechetDistance(48)).compute()["fid"]
    assert float(value) == pytest.approx(EXPECTED["frechet_inception_distance"], rel=RELATIVE)


@pytest.mark.parametrize("batch", [7, 500])
def test_inception_score_in_file_order(batch: int) -> None:
    metric = InceptionScore(splits=10, seed=None)
    for part in FEATURES["logits"].split(batch):
        metric.update(part)
    values = metric.compute()
    assert float(values["is"]) == pytest.approx(EXPECTED["inception_score_mean"], rel=RELATIVE)
    assert float(values["is_std"]) == pytest.approx(EXPECTED["inception_score_std"], rel=RELATIVE)


def test_kernel_distance() -> None:
    values = fed(KernelDistance(subsets=50, subset_size=200, seed=0)).compute()
    assert float(values["kid"]) == pytest.approx(EXPECTED["kernel_inception_distance_mean"], rel=RELATIVE)
    assert float(values["kid_std"]) == pytest.approx(EXPECTED["kernel_inception_distance_std"], rel=RELATIVE)


@pytest.mark.parametrize("neighbours", [3, 5])
def test_precision_and_recall(neighbours: int) -> None:
    values = fed(PrecisionRecall(neighbours)).compute()
    expected = EXPECTED[f"prc_k{neighbours}"]
    assert float(values["precision"]) == pytest.approx(expected["precision"], rel=RELATIVE)
    assert float(values["recall"]) == pytest.approx(expected["recall"], rel=RELATIVE)
