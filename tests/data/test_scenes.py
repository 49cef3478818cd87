"""Scenes: the same for any workers, and boxes, label maps and captions that say what is there."""

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ldmlab.annotations import area
from ldmlab.app import cli
from ldmlab.data.manifest import read_manifest
from ldmlab.data.scene_shards import (
    CLASSES,
    HUES,
    PATTERNS,
    Scene,
    SceneSettings,
    cut,
    draw_scene,
    load_objects,
    write_scenes,
)
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.tasks.layout import Layout
from ldmlab.tasks.semantic import Semantic

EMOJI = str(Path(__file__).parents[2] / "data" / "emoji-256" / "train")
SETTINGS = SceneSettings(EMOJI)


def scenes(count: int, settings: SceneSettings = SETTINGS) -> list[Scene]:
    return [draw_scene(settings, f"train-{number}") for number in range(count)]


def shards(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in sorted(folder.glob("*/*.tar"))}


@pytest.mark.slow
def test_shards_are_the_same_for_any_workers(tmp_path: Path) -> None:
    settings = SceneSettings(EMOJI, size=24, classes=("apple", "tree"))
    for workers in (1, 2):
        write_scenes(tmp_path / str(workers), {"train": 20, "val": 5}, settings, shard_size=12, workers=workers)
    one, two = shards(tmp_path / "1"), shards(tmp_path / "2")
    assert list(one) == ["train/train-000000.tar", "train/train-000001.tar", "val/val-000000.tar"]
    assert one == two
    again = write_scenes(tmp_path / "1", {"train": 20, "val": 5}, settings, shard_size=12, workers=1)
    assert {split: manifest.total for split, manifest in again.items()} == {"train": 20, "val": 5}
    with pytest.raises(InputError, match="begun with other images"):
        write_scenes(tmp_path / "1", {"train": 20, "val": 5}, replace(settings, seed=1), shard_size=12)


def test_seed_and_key_decide() -> None:
    first = draw_scene(SETTINGS, "train-0").image.tobytes()
    assert draw_scene(SETTINGS, "train-0").image.tobytes() == first
    assert draw_scene(SETTINGS, "val-0").image.tobytes() != first
    assert draw_scene(SceneSettings(EMOJI, seed=1), "train-0").image.tobytes() != first


def test_a_lone_object_fills_its_box_in_the_label_map() -> None:
    for scene in scenes(40, SceneSettings(EMOJI, most=1)):
        (entry,) = scene.boxes
        labels = np.asarray(scene.labels)
        assert set(np.unique(labels)) == {0, entry["class_id"] + 1}
        rows, columns = np.nonzero(labels)
        seen = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert np.abs(seen - np.array(entry["box"]) * 64).max() <= 2  # thin edges are less than half opaque


def test_objects_hide_little_of_each_other() -> None:
    made = scenes(120)
    assert {len(scene.boxes) for scene in made} == {1, 2, 3, 4, 5}
    for scene in made:
        labels = np.asarray(scene.labels)
        assert set(np.unique(labels)) == {0} | {entry["class_id"] + 1 for entry in scene.boxes}
        for one, other in combinations([entry["box"] for entry in scene.boxes], 2):
            width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
            assert max(width, 0) * max(height, 0) <= 0.2 * min(area(one), area(other)) + 1e-9


def test_the_labelled_pixels_are_the_objects() -> None:
    """Red apples on any background: red where the map says so, and nowhere else so red."""
    for scene in scenes(10, SceneSettings(EMOJI, classes=("heart",))):
        pixels, labels = np.asarray(scene.image).astype(int), np.asarray(scene.labels)
        redness = pixels[..., 0] - pixels[..., 1]
        assert redness[labels == 1].mean() > 120 > 90 > redness[labels == 0].mean()


def test_all_classes_come_and_the_caption_names_them() -> None:
    made = scenes(200)
    assert len(CLASSES) >= 20
    assert {entry["class_id"] for scene in made for entry in scene.boxes} == set(range(len(CLASSES)))
    for scene in made:
        assert all(list(CLASSES)[entry["class_id"]] in scene.caption for entry in scene.boxes)
        _, ground = scene.caption.split(" on ")
        assert ground.split(" ")[0] in HUES
        assert ground.split(" ")[1] in PATTERNS


def test_a_cut_takes_the_white_around_and_leaves_the_white_inside() -> None:
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((8, 8, 55, 55), fill="white", outline="black", width=6)
    alpha = np.asarray(cut(image).getchannel("A"))
    assert alpha.shape[0] == alpha.shape[1] <= 48
    assert alpha[24, 24] == 255  # white, but enclosed
    assert alpha[0, 0] == 0


def test_classes_of_ones_own(tmp_path: Path) -> None:
    settings = SceneSettings(EMOJI, size=32, classes=("tree", "lobster"))
    assert [len(images) for images in load_objects(Path(EMOJI), settings.classes)] == [2, 1]
    manifest = write_scenes(tmp_path / "two", {"train": 4}, settings, workers=1)["train"]
    assert manifest.classes == ["tree", "lobster"]


def test_the_command_writes_what_the_tasks_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        f"scenes {tmp_path / 'out'} --count 9 --val 3 --size 32 --objects 2-3 --format png --workers 1 --emoji {EMOJI}"
    )
    assert cli.dispatch(words.split()) == 0
    assert "9 scenes of 24 classes" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out" / "train").image_size == 32
    data = ShardData(str(tmp_path / "out/train"), str(tmp_path / "out/val"), 32, workers=0, fields=())
    (batch,) = data.with_task(Layout(32)).eval_loader("val", 3)
    assert all(2 <= len(boxes) <= 3 for boxes in batch["boxes"])
    (batch,) = data.with_task(Semantic(32, classes=25)).eval_loader("val", 3)
    assert batch["segmentation"].shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--classes", "apple,appel"], "classes=appel is neither one of apple"),
        (["--classes", "apple,apple"], "name every class once"),
        (["--size", "8"], "size=8 px is too small"),
        (["--objects", "2-9"], "objects=2 to 9"),
        (["--objects", "few"], "--objects few is no range"),
        (["--count", "0"], "--count 0 must be at least 1"),
        (["--emoji", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_one_sentence(options: list[str], said: str, tmp_path: Path) -> None:
    emoji = [] if "--emoji" in options else ["--emoji", EMOJI]
    with pytest.raises(InputError, match=said) as caught:
        cli.dispatch(["scenes", str(tmp_path / "out"), *emoji, "--workers", "1", *options])
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tar"))
