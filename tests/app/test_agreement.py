"""What task, conditioner, data and protocol say of the same thing is derived or refused before any work."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ldmlab.app.compose import compose, plain
from ldmlab.app.conditioning import check_agreement, scored_task, with_classes_of
from ldmlab.conditioners.layout_tokens import LayoutTokens
from ldmlab.conditioners.low_resolution import LowResolution
from ldmlab.conditioners.semantic_map import SpatialRescaler
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.tasks.crop import Crop
from ldmlab.tasks.inpainting import Inpainting
from ldmlab.tasks.layout import Layout
from ldmlab.tasks.semantic import Semantic
from scenes import write_scenes

NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes whose manifest names four classes, though they show eight."""
    folder = tmp_path_factory.mktemp("agreement")
    write_scenes(folder / "train", 12, objects=[2] * 12, without=("class_id",))  # which is of a whole image
    manifest = folder / "train" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "classes": NAMES}))
    return folder


def data(root: Path) -> ShardData:
    return ShardData(f"{root}/train", f"{root}/train", 16, fields=())


def config(*options: str) -> dict[str, Any]:
    return plain(compose("train", list(options)))


@pytest.mark.parametrize("name", ["openimages_256", "openimages_512", "coco_scratch", "coco_finetuned"])
def test_the_papers_layouts_know_the_classes_of_their_data(name: str, root: Path) -> None:
    told = with_classes_of(config(f"experiment=paper/layout/{name}"), data(root))
    assert told["conditioner"]["layout"]["classes"] == told["task"]["classes"] == len(NAMES)
    assert told["conditioner"]["layout"]["names"] == NAMES


def test_classes_that_are_given_stay(root: Path) -> None:
    told = with_classes_of(config("conditioner=layout", "task=layout", "conditioner.layout.classes=8"), data(root))
    assert told["conditioner"]["layout"]["classes"] == told["task"]["classes"] == 8
    unconditional = config("conditioner=none")
    assert with_classes_of(unconditional, data(root)) is unconditional


def test_boxes_of_unknown_classes_are_bad_samples(root: Path) -> None:
    known = data(root).with_task(Layout(16, classes=len(NAMES)))
    dataset = known.train_dataset()
    skipped = [reason for position in range(12) for reason in dataset[position]["skipped"]]
    assert any("of a box is not 0 .. 3 (task.classes)" in reason for reason in skipped)
    good = [dataset[position]["boxes"] for position in range(12)]
    assert all(box["class_id"] < len(NAMES) for boxes in good for box in boxes)


def test_disagreement_is_refused() -> None:
    layout = {"layout": LayoutTokens(width=8, depth=1, objects=5)}
    with pytest.raises(InputError, match=r"task\.most=30 boxes an image are more than conditioner\.layout\.objects=5"):
        check_agreement(Layout(16), layout)
    check_agreement(Layout(16, most=5), layout)
    with pytest.raises(InputError, match=r"task\.classes=12, but conditioner\.semantic\.classes=9"):
        check_agreement(Semantic(16, 12), {"semantic": SpatialRescaler(9)})
    check_agreement(Semantic(16, 9), {"semantic": SpatialRescaler(9)})
    check_agreement(None, layout)


def test_options_of_one_thing_follow_each_other() -> None:
    told = config("conditioner=semantic", "task=semantic", "conditioner.semantic.classes=9")
    assert told["task"]["classes"] == 9
    told = config("conditioner=layout", "task=layout", "conditioner.layout.objects=7")
    assert told["task"]["most"] == 7
    told = config("conditioner=low_resolution", "task=super_resolution", "task.factor=8")
    assert told["conditioner"]["low_resolution"]["factor"] == 8
    assert LowResolution(enlarge=None, factor=8, downsampling=4).enlarge == 2
    with pytest.raises(InputError, match=r"task\.factor=4 is no multiple of the first stage's factor 8"):
        LowResolution(enlarge=None, factor=4, downsampling=8)


def test_a_protocol_may_ask_at_another_size_than_trained() -> None:
    trained = Inpainting(256, masks="thick_256", crop=Crop("window"))
    protocol = Protocol("p", "val", {}, image_size=512, task={"held_out_masks": "thick_512"})
    asked = scored_task(trained, protocol, 512)
    assert asked == replace(trained, image_size=512, held_out_masks="thick_512")
    assert (asked.held_out.image_size, asked.held_out.masks) == (512, "thick_512")
    assert protocol.settings().size == 512
    assert scored_task(None, Protocol("p", "val", {}), 256) is None
    with pytest.raises(InputError, match=r"protocol\.task\.held_out_masks: the model's task has no such option"):
        scored_task(Layout(256), protocol, 512)


def test_the_papers_inpainting_is_scored_at_its_size() -> None:
    node = plain(compose("evaluate", ["model=RUN", "protocol=paper_inpainting"]))["protocol"]
    assert (node["image_size"], node["task"]) == (512, {"held_out_masks": "thick_512"})
