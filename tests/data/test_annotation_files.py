"""Published annotations to boxes, classes and captions of packed images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shard_maker import stored_samples

from ldmlab.annotations import cropped, mirrored
from ldmlab.app import cli
from ldmlab.data.annotation_files import read_annotations, read_classes
from ldmlab.data.image_parts import decode_parts
from ldmlab.data.manifest import read_manifest
from refusals import refusal

ROOT = Path(__file__).parents[2]
THINGS = [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}]
STUFF = [{"id": 92, "name": "banner"}, {"id": 183, "name": "other"}]
HEADER = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images of 40 x 20, and annotations of two of them and of one that is not there."""
    (tmp_path / "images").mkdir()
    for name in ("01", "02", "03"):
        Image.new("RGB", (40, 20), (int(name), 0, 0)).save(tmp_path / "images" / f"{name}.jpg")
    images = [{"id": n, "file_name": f"0{n}.jpg", "width": 40, "height": 20} for n in (1, 2, 9)]
    things = [
        {"image_id": 1, "category_id": 18, "bbox": [10, 5, 20, 10], "iscrowd": 0},
        {"image_id": 2, "category_id": 3, "bbox": [0, 0, 4, 20], "iscrowd": 1},
        {"image_id": 9, "category_id": 3, "bbox": [0, 0, 4, 4], "iscrowd": 0},
    ]
    stuff = [
        {"image_id": 1, "category_id": 92, "bbox": [20, 0, 21, 20], "iscrowd": 0},  # a pixel too wide
        {"image_id": 1, "category_id": 183, "bbox": [0, 0, 40, 20], "iscrowd": 0},
        {"image_id": 1, "category_id": 92, "bbox": [40, 0, 1, 20], "iscrowd": 0},  # nothing of it inside
    ]
    captions = [{"image_id": n, "caption": f"{text} \n"} for n, text in ((1, "a dog"), (2, "a car"), (1, "dogs"))]
    for name, content in {
        "things": {"images": images, "annotations": things, "categories": THINGS},
        "stuff": {"images": images, "annotations": stuff, "categories": STUFF},
        "captions": {"images": images, "annotations": captions},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    rows = [
        "01,x,/m/2,1,0.25,0.75,0.25,0.75,1,0,0,-1,1",
        "02,x,/m/9,1,0,1,0,1,0,0,0,0,0",
        "02,x,/m/3,1,0,1,0,1,0,0,1,0,0",
    ]
    (tmp_path / "boxes.csv").write_text("\n".join([HEADER, *rows]))
    (tmp_path / "classes.csv").write_text("/m/1,Cat\n/m/2,Dog\n")
    (tmp_path / "merged.tsv").write_text("# ids, name\n/m/1\tCat\n/m/2\t/m/3\tDog\n")
    return tmp_path


def packed(folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    """KEY.json of every image by key."""
    command = ["pack", str(folder / "images"), str(folder / "out"), "--crop", "keep", "--workers", "1", *words]
    assert cli.dispatch(command) == 0
    return {key: json.loads(files["json"]) for key, files in stored_samples(folder / "out" / "train").items()}


def test_coco_boxes_of_things_and_stuff(folder: Path) -> None:
    found = packed(folder, "--annotations", f"{folder}/things.json", "--annotations", f"{folder}/stuff.json")
    assert read_manifest(folder / "out" / "train").classes == ["dog", "car", "banner"]  # 18, 3, 92 as text
    assert found["01"]["boxes"] == [
        {"class_id": 0, "box": [0.25, 0.25, 0.75, 0.75]},
        {"class_id": 2, "box": [0.5, 0.0, 1.0, 1.0]},
    ]
    assert found["02"]["boxes"] == [{"class_id": 1, "box": [0.0, 0.0, 0.1, 1.0], "group_of": True}]
    assert found["03"]["boxes"] == []


def test_coco_captions(folder: Path) -> None:
    found = packed(folder, "--annotations", f"{folder}/captions.json", "--max-bad", "0.5")
    assert found.keys() == {"01", "02"}  # the third has none
    assert (found["01"]["caption"], found["01"]["captions"]) == ("a dog", ["a dog", "dogs"])
    assert read_manifest(folder / "out" / "train").classes is None


def test_open_images_boxes(folder: Path) -> None:
    found = packed(folder, "--annotations", f"{folder}/boxes.csv", "--classes", f"{folder}/classes.csv")
    box = {"class_id": 1, "box": [0.25, 0.25, 0.75, 0.75], "occluded": True, "inside": True}
    assert (found["01"]["boxes"], found["02"]["boxes"]) == ([box], [])
    assert read_manifest(folder / "out" / "train").classes == ["Cat", "Dog"]


def test_merged_classes_count_as_one(folder: Path) -> None:
    found = packed(folder, "--annotations", f"{folder}/boxes.csv", "--classes", f"{folder}/merged.tsv")
    assert found["02"]["boxes"] == [{"class_id": 1, "box": [0.0, 0.0, 1.0, 1.0], "group_of": True}]


def test_the_shipped_classes_of_open_images() -> None:
    table = read_classes(ROOT / "data" / "openimages-classes.tsv")
    assert len(table.names) == 340
    assert len(table.numbers) == 340 + 12 + 340  # ids, merged ids, names
    assert table.names[table.numbers["/m/04yx4"]] == "Person"  # a man
    assert table.names[-1] == "Suitcase"


def test_maps_of_other_folders(folder: Path) -> None:
    (folder / "maps").mkdir()
    for name, value in (("01", 200), ("02", 255)):
        Image.new("L", (40, 20), value).save(folder / "maps" / f"{name}.png")
    words = ["--label-maps", f"{folder}/maps", "--masks", f"{folder}/maps", "--max-bad", "0.5"]
    assert packed(folder, *words).keys() == {"01", "02"}  # the third has no maps
    stored = stored_samples(folder / "out" / "train")
    assert np.all(decode_parts(stored["02"], {"segmentation"}, None)["segmentation"] == 255)
    assert decode_parts(stored["02"], {"mask"}, None)["mask"].all()


def test_what_means_nothing_is_refused(folder: Path) -> None:
    (folder / "list.json").write_text("[]")
    (folder / "far.json").write_text(json.dumps({"images": [], "annotations": [{"image_id": 4, "bbox": []}]}))
    (folder / "no.csv").write_text("a,b\n1,2\n")
    (folder / "torn.csv").write_text(f"{HEADER}\n01,x\n")
    (folder / "twice.csv").write_text("/m/1,Cat\n/m/1,Dog\n")
    names = {"01", "02"}
    for file, classes, message in [
        ("list.json", None, "has no `images` and `annotations`"),
        ("far.json", None, "of image 4, which it does not list"),
        ("gone.json", None, "cannot be read as JSON"),
        ("boxes.csv", None, "give --classes FILE"),
        ("no.csv", "classes.csv", "neither COCO's JSON nor a CSV"),
        ("torn.csv", "classes.csv", "cannot be read"),
        ("boxes.csv", "twice.csv", "names /m/1 in two lines"),
    ]:
        table = folder / classes if classes else None
        assert message in refusal(lambda f=file, t=table: read_annotations([folder / f], t, names))  # type: ignore
    command = ["pack", str(folder / "images"), str(folder / "never")]
    assert "--annotations" in refusal(lambda: cli.dispatch([*command, "--classes", f"{folder}/classes.csv"]))
    assert "is no folder" in refusal(lambda: cli.dispatch([*command, "--label-maps", f"{folder}/none"]))
    (folder / "images" / "01.jpg").rename(folder / "images" / "a.jpg")
    (folder / "images" / "02.jpg").rename(folder / "images" / "b.jpg")
    sentence = refusal(lambda: cli.dispatch([*command, "--annotations", f"{folder}/things.json"]))
    assert "none of them is of an image in SOURCE" in sentence


def test_a_cut_box_keeps_its_extent() -> None:
    box = {"class_id": 1, "box": [0.25, 0.0, 0.75, 0.5]}
    (once,) = cropped([box], [0.5, 0.0, 1.0, 1.0])
    assert once == {"class_id": 1, "box": [0.0, 0.0, 0.5, 0.5], "uncut": [-0.5, 0.0, 0.5, 0.5]}
    assert mirrored([once])[0]["uncut"] == [0.5, 0.0, 1.5, 0.5]
    (twice,) = cropped([once], [0.0, 0.0, 1.0, 0.25])
    assert twice["uncut"] == [-0.5, 0.0, 0.5, 2.0]
    (whole,) = cropped([box], [0.0, 0.0, 1.0, 1.0])
    assert whole == box
