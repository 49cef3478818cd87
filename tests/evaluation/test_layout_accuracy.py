"""The accuracy of boxes: perfect samples reach the score of real images, wrong ones fall to chance."""

from pathlib import Path

import pytest
import torch
from answering_models import Answers, evaluate, originals, scene_data

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.evaluators import others
from ldmlab.evaluation.layout_accuracy import LayoutAccuracy, crop
from ldmlab.evaluation.protocol import Protocol
from ldmlab.tasks.layout import Layout
from scenes import CLASSES

PROTOCOL = Protocol(name="boxes", reference="val", metrics={}, steps=1, guidance_scale=1.0, shown=6)
EVALUATOR = LayoutAccuracy(steps=60, batch_size=32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> ShardData:
    return scene_data(tmp_path_factory.mktemp("scenes"), 100, 40, Layout(32))


@pytest.mark.slow
def test_real_images_as_samples_reach_the_real_score(data: ShardData, tmp_path: Path) -> None:
    real = originals(data)
    model = Answers({"boxes"}, lambda requests, numbers: real[numbers])
    found = evaluate(model, data, PROTOCOL, tmp_path / "out", evaluators={"layout": EVALUATOR})["evaluators"]["layout"]
    assert found["samples"] == found["real"]
    assert found["real"] > 0.8
    assert found["chance"] == 1 / CLASSES
    assert found["times_chance"] > 5
    assert found["shuffled"] < 2.5 / CLASSES
    assert (found["of_real"], len(found["classes"])) == (1.0, CLASSES)
    boxes = len(EVALUATOR.collected(data.eval_loader("train", 50, kind="images"))[1])
    assert found["learned"] == {"examples": boxes, "updates": 60, "batch_size": 32}
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"trained on {boxes:,} real examples in 60 updates of 32" in page
    assert "Conditioning accuracy: boxes classified as the class of their condition" in page
    assert "Inputs and samples" in page
    assert "Boxes classified as the class of their condition" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
def test_images_of_other_layouts_fall_to_chance(data: ShardData, tmp_path: Path) -> None:
    real = originals(data)
    model = Answers({"boxes"}, lambda requests, numbers: real[[(number + 7) % len(real) for number in numbers]])
    found = evaluate(model, data, PROTOCOL, tmp_path / "out", evaluators={"layout": EVALUATOR})["evaluators"]["layout"]
    assert found["real"] > 0.8
    assert found["samples"] < 2.5 / CLASSES


def test_an_evaluator_needs_a_model_of_its_task(data: ShardData, tmp_path: Path) -> None:
    model = Answers({"caption"}, lambda requests, numbers: originals(data)[numbers])
    with pytest.raises(InputError, match=r"protocol.evaluators.layout works with boxes, .*its inputs: caption"):
        evaluate(model, data.with_task(None), PROTOCOL, tmp_path / "out", evaluators={"layout": EVALUATOR})


def test_a_crop_is_what_lies_in_the_box() -> None:
    image = torch.zeros(3, 40, 20, dtype=torch.uint8)
    image[0, 10:20, 5:15] = 200
    inside = crop(image, [0.25, 0.25, 0.75, 0.5])
    assert inside.shape == (3, 32, 32)
    assert (inside[0] == 200).all()
    wider = crop(image, [0.25, 0.25, 0.75, 0.5], margin=0.5)
    assert 0.2 < (wider[0] > 100).float().mean() < 0.3
    assert crop(image, [0.999, 0.999, 1.0, 1.0]).shape == (3, 32, 32)


def test_boxes_that_are_too_small_are_left_out() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    boxes = [{"class_id": 3, "box": [0.0, 0.0, 0.5, 0.5]}, {"class_id": 4, "box": [0.0, 0.0, 0.1, 1.0]}]
    batch = {"image": image[None], "boxes": [boxes]}
    assert EVALUATOR.collected([batch])[1] == ["3"]
    with pytest.raises(InputError, match="nothing to measure layouts by"):
        LayoutAccuracy(smallest=20).collected([batch])


def test_others_have_different_conditions() -> None:
    conditions = [{"class_id": number % 3} for number in range(30)]
    exchanged = others(conditions, seed=0)
    assert all(one != other for one, other in zip(conditions, exchanged, strict=True))
    assert {one["class_id"] for one in exchanged} == {0, 1, 2}
    assert others([{"class_id": 1}] * 3, seed=0) == [{"class_id": 1}] * 3
