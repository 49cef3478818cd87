"""One pass feeds all scores; protocols decide the conditions of samples."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.evaluation.scoring import EvaluationPass, numbered
from ldmlab.evaluation.sources import requests
from ldmlab.metrics.clip_scores import ClipScore
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.metrics.inception_score import InceptionScore
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall


class MeanColours:
    """Six numbers an image; counts its calls."""

    name, weights_hash, width, gives = "mean colours", "0", 6, frozenset({"features"})

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        self.seen += len(images)
        pixels = images.float()
        return {"features": torch.cat([pixels.mean(dim=(2, 3)), pixels.std(dim=(2, 3))], dim=1)}


def batches(count: int, seed: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    index = torch.arange(count)
    return [
        {"key": [str(i) for i in part.tolist()], "position": part, "image": images[part]} for part in index.split(16)
    ]


def test_one_pass_feeds_every_score() -> None:
    extractor = MeanColours()
    metrics = {"fid": FrechetDistance(6), "kid": KernelDistance(5, 20), "precision_recall": PrecisionRecall()}
    seen = EvaluationPass(extractor, metrics, keep=True)
    seen.add_all(numbered(batches(50, 0)), real=True)
    seen.add_all(numbered(batches(40, 1)), real=False)
    scores = seen.compute()
    assert extractor.seen == 90
    assert set(scores) == {"fid", "kid", "precision", "recall"}
    assert scores["kid"].spread is not None
    assert scores["fid"].spread is None
    assert "small sample: 40 images" in scores["fid"].marks[0]
    assert len(torch.cat(seen.features[False])) == 40


def test_few_images_are_marked() -> None:
    seen = EvaluationPass(MeanColours(), {"fid": FrechetDistance(6, small_sample=True)})
    seen.add_all(numbered(batches(5, 0)), real=True)
    seen.add_all(numbered(batches(5, 1)), real=False)
    assert "rank deficient" in seen.compute()["fid"].marks[1]


def test_inception_score_needs_logits() -> None:
    with pytest.raises(InputError, match=r"protocol\.metrics\.is needs logits"):
        EvaluationPass(MeanColours(), {"is": InceptionScore()})


class WithCaptions(MeanColours):
    """Its texts are numbers: the caption "7" is embedded as 7, 8, ... 12."""

    gives = frozenset({"features", "clip", "text"})

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        features = super().__call__(images)["features"]
        return {"features": features, "clip": features}

    def texts(self, captions: list[str]) -> Tensor:
        return torch.tensor([[float(caption) + column for column in range(6)] for caption in captions])


def test_captions_go_with_the_number_of_a_sample() -> None:
    extractor = WithCaptions()
    seen = EvaluationPass(extractor, {"clip_score": ClipScore()}, captions=lambda number: str(3 * number))
    generated = batches(40, 1)
    seen.add_all(numbered(batches(50, 0)), real=True)
    seen.add_all(numbered(reversed(generated)), real=False)
    images = torch.cat([batch["image"] for batch in generated])
    texts = extractor.texts([str(3 * number) for number in range(40)])
    cosine = torch.nn.functional.cosine_similarity(extractor(images)["clip"].double(), texts.double())
    score = seen.compute()["clip_score"]
    assert score.value == pytest.approx(100 * float(cosine.mean()), rel=1e-6)
    assert score.spread is not None
    with pytest.raises(InputError, match=r"protocol\.metrics\.clip_score needs the captions"):
        EvaluationPass(extractor, {"clip_score": ClipScore()})
    with pytest.raises(InputError, match=r"needs clip.*choose features=inception_and_clip"):
        EvaluationPass(MeanColours(), {"clip_score": ClipScore()})


def protocol(**options: Any) -> Protocol:
    return Protocol(**{"name": "test", "samples": 6, "reference": "val", "metrics": {}, **options})


def test_balanced_classes_ask_for_every_class_equally_often() -> None:
    chosen = protocol(samples=50_000, conditions="balanced_classes", classes=1000)
    counts = Counter(request["class_id"] for request in requests(chosen, frozenset({"class_id"}), []))
    assert set(counts.values()) == {50}
    assert len(counts) == 1000


def test_captions_follow_the_reference() -> None:
    reference = [{"caption": "a"}, {"caption": "b"}]
    conditions = requests(protocol(samples=3), frozenset({"caption"}), reference)
    assert list(conditions) == [{"caption": "a"}, {"caption": "b"}, {"caption": "a"}]
    assert requests(protocol(samples=2), frozenset(), reference) == [{}, {}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": "test"}, "choose one of train, val"),
        ({"conditions": "all"}, "choose one of none, reference, balanced_classes"),
        ({"samples": 1}, "too few to score"),
        ({"classes": 3}, "give both or neither"),
    ],
)
def test_a_wrong_protocol_is_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        protocol(**options)


def test_a_model_without_its_conditions_is_refused() -> None:
    with pytest.raises(InputError, match="have no caption"):
        requests(protocol(), frozenset({"caption"}), [{"class_id": 3}])
    with pytest.raises(InputError, match="choose reference or balanced_classes"):
        requests(protocol(conditions="none"), frozenset({"caption"}), [])
