"""The accuracy of label maps and of classes, on images whose content is known."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmlab.errors import InputError
from ldmlab.evaluation.classifier import Learned
from ldmlab.evaluation.evaluators import ClassAccuracy, Evidence
from ldmlab.evaluation.segmentation_accuracy import SegmentationAccuracy, overlaps, resized_labels

COLOURS = torch.tensor([[235, 235, 235], [210, 40, 40], [40, 170, 60], [50, 70, 210]], dtype=torch.uint8)
EVALUATOR = SegmentationAccuracy(steps=40, batch_size=8)


def scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images with two coloured squares (N, 3, 64, 64) and their maps (N, 64, 64)."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(count, 64, 64, dtype=torch.uint8)
    for one in maps:
        for _ in range(2):
            kind, top, left = (
                int(torch.randint(*span, (), generator=generator)) for span in ((1, 4), (0, 40), (0, 40))
            )
            one[top : top + 24, left : left + 24] = kind
    noise = torch.randint(-20, 21, (count, 3, 64, 64), generator=generator)
    return (COLOURS[maps.long()].permute(0, 3, 1, 2) + noise).clamp(0, 255).to(torch.uint8), maps


def real(split: str, fields: tuple[str, ...]) -> Iterable[dict[str, Any]]:
    images, maps = scenes(60, 0) if split == "train" else scenes(20, 1)
    kinds = maps.flatten(1).amax(1)
    whole = COLOURS[kinds.long()][:, :, None, None].expand_as(images)
    image = whole if "class_id" in fields else images
    yield {"key": list(range(len(maps))), "image": image, "segmentation": maps, "class_id": kinds}


def evidence(samples: Tensor, conditions: list[dict[str, Any]]) -> Evidence:
    return Evidence(real, "val", conditions, samples, class_names=["none", "red", "green", "blue"])


@pytest.mark.slow
def test_real_images_as_samples_reach_the_real_score_and_shuffled_maps_do_not() -> None:
    images, maps = scenes(20, 1)
    result = EVALUATOR(evidence(images, [{"segmentation": one.numpy()} for one in maps]))
    assert result.samples == result.real
    assert result.real > 0.7
    assert result.shuffled < 0.3
    assert result.chance is None
    assert result.of_real == 1.0
    assert [one.name for one in result.classes] == ["label 1", "label 2", "label 3"]
    assert result.learned == Learned(examples=60, updates=40, batch_size=8)


def test_intersection_over_union_by_hand() -> None:
    given = torch.tensor([[[0, 1], [1, 2]], [[0, 0], [0, 2]]])
    found = torch.tensor([[[0, 1], [2, 2]], [[3, 0], [0, 0]]])
    table = overlaps(found, given, 4)
    assert (table.scores, table.counts) == ([1 / 2, 1 / 3, None], [2, 2, 0])  # without background; no map holds 3
    assert table.mean == pytest.approx((1 / 2 + 1 / 3) / 2)
    with pytest.raises(InputError, match="label 2 is in an input map but in no training image"):
        overlaps(found, given, 2)
    with pytest.raises(InputError, match="anything but background"):
        overlaps(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2), 3)


def test_maps_of_another_size_are_read_at_pixel_centres() -> None:
    small = torch.tensor([[[1, 2], [3, 4]]])
    shown = resized_labels(small)
    assert shown.shape == (1, 64, 64)
    assert shown[0, ::32, ::32].tolist() == small[0].tolist()
    assert shown[0, 31::32, 31::32].tolist() == small[0].tolist()


def test_the_accuracy_of_classes() -> None:
    kinds = torch.arange(18) % 3 + 1
    images = COLOURS[kinds][:, :, None, None].expand(-1, -1, 64, 64).contiguous()
    conditions = [{"class_id": int(kind)} for kind in kinds]
    classifier = ClassAccuracy(steps=30, batch_size=16)
    result = classifier(evidence(images, conditions))
    assert (result.samples, result.real, result.shuffled) == (1.0, 1.0, 0.0)
    assert result.chance == pytest.approx(1 / 3)
    assert [one.name for one in result.classes] == ["red", "green", "blue"]
    assert result.learned == Learned(examples=60, updates=30, batch_size=16)
    wrong = classifier(evidence(images, [{"class_id": int(kind) % 3 + 1} for kind in kinds]))
    assert wrong.samples == 0.0
