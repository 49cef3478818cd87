"""A score that so few images cannot give is refused before any sample is drawn."""

import math

import pytest
import torch
from torchmetrics import Metric

from ldmlab.app.commands.score import fitting
from ldmlab.errors import InputError
from ldmlab.evaluation.scoring import EvaluationPass
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.inception_score import InceptionScore
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import DensityCoverage, PrecisionRecall


class Extractor:
    name, width, gives = "drawn", 8, frozenset({"features", "logits"})


@pytest.mark.parametrize(
    ("name", "metric", "counts", "told"),
    [
        ("kid", KernelDistance(subset_size=50), (100, 49), r"metrics\.kid\.subset_size=50 .* 49 generated"),
        ("fid", FrechetDistance(8), (100, 7), r"7 generated images are fewer than the 8 features"),
        ("fid", FrechetDistance(8), (7, 100), r"7 real images are fewer than the 8 features"),
        ("is", InceptionScore(splits=10), (0, 9), r"9 generated images cannot be cut into .*metrics\.is\.splits=10"),
        ("precision_recall", PrecisionRecall(neighbours=3), (100, 3), r"needs more than 3 generated images"),
        ("density_coverage", DensityCoverage(neighbours=5), (5, 100), r"needs more than 5 real images"),
    ],
)
def test_too_few_images(name: str, metric: Metric, counts: tuple[int, int], told: str) -> None:
    seen = EvaluationPass(Extractor(), {name: metric})
    with pytest.raises(InputError, match=told):
        seen.check_counts(*counts)
    seen.check_counts(100, 100)


@pytest.mark.parametrize(("count", "balls", "kernel"), [(3, 2, 3), (60, 3, 60)])
def test_what_is_not_set_follows_the_set(count: int, balls: int, kernel: int) -> None:
    metrics: dict[str, Metric] = {"kid": KernelDistance(subsets=2), "precision_recall": PrecisionRecall()}
    metrics |= {"density_coverage": DensityCoverage(), "is": InceptionScore()}
    seen = EvaluationPass(Extractor(), metrics)
    seen.check_counts(count, count)
    generator = torch.Generator().manual_seed(0)
    for real in (True, False):
        features = torch.randn(count, 8, generator=generator)
        seen._take({"features": features, "logits": features}, real, torch.arange(count))
    assert all(math.isfinite(score.value) for score in seen.compute().values())
    assert seen.used_options() == {
        "kid": {"subset_size": kernel},
        "precision_recall": {"neighbours": balls},
        "density_coverage": {"neighbours": min(count - 1, 5)},
        "is": {"splits": 1 if count == 3 else 10},
    }


def test_the_usual_scores_fit_small_sets(capsys: pytest.CaptureFixture[str]) -> None:
    nodes: dict[str, dict[str, bool]] = {"fid": {"small_sample": False}, "kid": {}}
    assert set(fitting(nodes, 60, 2048)) == {"kid"}
    assert "fid is left out: 60 images are fewer than the 2,048 features" in capsys.readouterr().err
    assert set(fitting(nodes, 2048, 2048)) == {"fid", "kid"}
    assert set(fitting({**nodes, "fid": {"small_sample": True}}, 60, 2048)) == {"fid", "kid"}
