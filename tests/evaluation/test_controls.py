"""Controls beside scores: they belong to their images, and a score that noise reaches too is marked."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.data.shard_data import ShardData
from ldmlab.evaluation.controls import control_count, controls, doubted, shuffled
from ldmlab.evaluation.real_images import RealImages
from ldmlab.evaluation.scoring import EvaluationPass, Score
from ldmlab.metrics.kernel import KernelDistance
from ldmlab.metrics.precision_recall import PrecisionRecall

sys.path.append(str(Path(__file__).parents[1] / "data"))
from shard_maker import write_shards


class Pixels:
    """Features that see everything, or (weak) the mean of the top left corner alone."""

    name, weights_hash, gives = "pixels", "none", frozenset({"features"})

    def __init__(self, weak: bool) -> None:
        self.weak, self.width = weak, 3 if weak else 192

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        part = images.float() / 255
        return {"features": part[:, :, :1, :1].flatten(1) if self.weak else part.flatten(1)}


def gradients(count: int, seed: int) -> Tensor:
    """Smooth images of random colours, uint8 (N, 3, 8, 8)."""
    ends = torch.rand(count, 3, 2, generator=torch.Generator().manual_seed(seed))
    ramp = torch.linspace(0, 1, 8)
    rows = ends[..., :1] + (ends[..., 1:] - ends[..., :1]) * ramp  # (N, 3, 8)
    return (rows[:, :, None] * 255).expand(-1, -1, 8, -1).to(torch.uint8)


def found_by(weak: bool) -> tuple[dict[str, Any], dict[str, Score]]:
    seen = EvaluationPass(Pixels(weak), {"kid": KernelDistance(subsets=20, subset_size=40), "pr": PrecisionRecall()})
    numbers = torch.arange(60)
    seen.add(gradients(60, 0), True, numbers)
    found = controls(seen, 60, (8, 8), lambda: [(numbers, gradients(60, 1))], "training images")
    seen.add(gradients(60, 2), False, numbers)
    return found, doubted(seen.compute(), found)


def test_noise_that_a_weak_network_takes_for_images_is_told() -> None:
    found, scores = found_by(weak=True)
    assert found["noise"]["scores"]["precision"]["value"] > 0.25
    assert any("uniform noise" in mark for mark in scores["precision"].marks)
    assert any("as well as real images" in mark for mark in scores["kid"].marks)
    found, scores = found_by(weak=False)
    assert found["noise"]["scores"]["precision"]["value"] == 0
    assert found["real"]["scores"]["precision"]["value"] > 0.5
    assert not any("uniform noise" in mark for name in ("kid", "precision") for mark in scores[name].marks)


def test_samples_like_noise_are_told() -> None:
    one = {"scores": {"kid": {"value": 3.0, "spread": None}}}
    found = {"noise": {"title": "uniform noise", **one}, "real": {"scores": {"kid": {"value": 0.1, "spread": None}}}}
    marked = doubted({"kid": Score(3.1, 0.2, higher_is_better=False)}, found)
    assert marked["kid"].marks == ("no better than uniform noise (3)",)
    assert doubted({"kid": Score(0.2, 0.2, higher_is_better=False)}, found)["kid"].marks == ()
    assert doubted({"new": Score(3.0, None)}, found)["new"].marks == ()


def test_real_images_worse_than_the_samples_cast_no_doubt() -> None:
    """Such as those of few classes: what the samples reach is what the score can tell apart."""
    found = {
        "noise": {"title": "uniform noise", "scores": {"kid": {"value": 6.0, "spread": None}}},
        "real": {"scores": {"kid": {"value": 7.0, "spread": None}}},
    }
    assert doubted({"kid": Score(0.4, 0.1, higher_is_better=False)}, found)["kid"].marks == ()


@pytest.mark.parametrize("batch", [2, 64])
def test_real_images_come_from_the_whole_split(tmp_path: Path, batch: int) -> None:
    """Shards are often stored class by class."""
    write_shards(tmp_path / "train", [20, 13], size=8)
    data = ShardData(str(tmp_path / "train"), str(tmp_path / "train"), image_size=8, workers=0)
    seen = [*RealImages(data, Pixels(weak=True), batch_size=batch).spread("train", 5)]  # type: ignore[arg-type]
    numbers = torch.cat([index for index, _ in seen])
    assert numbers.tolist() == [0, 1, 2, 3, 4]
    stored = data.val_dataset("images", "train")
    expected = [torch.as_tensor(stored[place]["image"]) for place in (0, 6, 13, 19, 26)]
    assert torch.equal(torch.cat([images for _, images in seen]), torch.stack(expected))


def test_an_image_is_shuffled_alike_in_any_batch() -> None:
    images, numbers = gradients(6, 3), torch.arange(6)
    mixed = shuffled(images, numbers)
    assert torch.equal(torch.cat([shuffled(images[i : i + 1], numbers[i : i + 1]) for i in range(6)]), mixed)
    assert not torch.equal(mixed, images)
    assert torch.equal(mixed.flatten(2).sort().values, images.flatten(2).sort().values)
    assert shuffled(torch.zeros(1, 3, 19, 17, dtype=torch.uint8), numbers[:1]).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(("size", "count"), [(None, 10), (50, 200)])
def test_as_many_controls_as_the_scores_need(size: int | None, count: int) -> None:
    seen = EvaluationPass(Pixels(weak=True), {"kid": KernelDistance(subset_size=size)})
    assert control_count(seen, 200, at_most=10) == count
    assert control_count(seen, 7, at_most=10) == 7
