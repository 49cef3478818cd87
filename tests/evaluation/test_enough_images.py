"""A score that so few images cannot give is refused before any sample is drawn."""

import pytest
from torchmetrics import Metric

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
