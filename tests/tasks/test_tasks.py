"""What each task derives from an image whose content is known."""

from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ldmlab.annotations import WHOLE, area
from ldmlab.app.compose import compose, plain
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.tasks.crop import Crop
from ldmlab.tasks.inpainting import Inpainting, LamaTest
from ldmlab.tasks.layout import Layout
from ldmlab.tasks.semantic import Semantic
from ldmlab.tasks.super_resolution import SuperResolution
from scenes import CLASSES, Scene

CONF = sorted(path for path in (Path(__file__).parents[2] / "conf" / "task").glob("*.yaml") if path.stem != "none")


def sample(number: int = 0, width: int = 48, height: int = 32, **fields: Any) -> dict[str, Any]:
    """What the data hand to a task: an image as stored, with all that lies on it."""
    scene = Scene(number, width, height)
    return {"image": scene.pixels, "segmentation": np.asarray(scene.labels), "boxes": scene.boxes, **fields}


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_task_of_conf_gives_what_it_says(path: Path) -> None:
    node = plain(compose(f"task/{path.stem}", []))["task"]
    task = instantiate({**node, "image_size": 256}, where="task")
    width, height = (640, 480) if node.get("crop", "always") else (256, 256)  # without a crop, images are square
    for variant in (task, task.held_out):
        given = sample(1, width, height, mask=np.zeros((1, height, width), np.uint8))
        needs = variant.needs | ({"image"} if width == height else set())  # images that come cropped
        told = {name: value for name, value in given.items() if name in needs}
        derived, same = variant.give(told, Random(1)), variant.give(told, Random(1))
        batch = {**given, **derived}
        assert variant.adds <= derived.keys()
        assert batch["image"].shape == (3, 256, 256)
        assert all(derived[name].shape[-2:] == (256, 256) for name in derived.keys() & {"mask", "segmentation"})
        assert same.keys() == derived.keys()
        assert all(np.array_equal(same[name], derived[name]) for name in same)  # a function of the random numbers
    images = torch.zeros(1, 3, 256, 256)
    finished = task.finish(images, {"mask": torch.ones(1, 1, 256, 256), "image": torch.zeros(1, 3, 256, 256)})
    assert torch.equal(finished, images)


@pytest.mark.parametrize("crop", [Crop("centre"), Crop("window"), Crop("window", short_side=24), Crop("random")])
def test_everything_on_a_image_is_cropped_alike(crop: Crop) -> None:
    for number in range(20):
        given = sample(number, 60, 40)
        cut = crop(given, 20, Random(number))
        assert cut["image"].shape == (3, 20, 20)
        left, top, right, bottom = cut["crop"]
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert (right - left) * 60 == pytest.approx((bottom - top) * 40)  # a square
        inside = {entry["class_id"] + 1 for entry in cut["boxes"]}
        assert set(np.unique(cut["segmentation"])) - {0} <= inside
        for entry in cut["boxes"]:  # labels of an object lie in its box, up to a pixel
            rows, columns = np.nonzero(cut["segmentation"] == entry["class_id"] + 1)
            if [e["class_id"] for e in cut["boxes"]].count(entry["class_id"]) == 1 and len(rows):
                box = [20 * value for value in entry["box"]]
                assert columns.min() >= box[0] - 1
                assert columns.max() <= box[2] + 1
                assert rows.min() >= box[1] - 1
                assert rows.max() <= box[3] + 1


def test_crops_have_the_scale_they_promise() -> None:
    for number in range(50):
        assert Crop("window", short_side=384).box(800, 600, 256, Random(number))[2] == 400
        assert Crop("window").box(800, 600, 256, Random(number))[1:] == (0, 600)
        assert 256 <= Crop("random").box(800, 600, 256, Random(number))[2] <= 600
        assert 300 <= Crop("random", smallest=0.5).box(800, 600, 256, Random(number))[2] <= 600
        assert Crop("random").box(100, 90, 256, Random(number))[2] == 90  # smaller than asked: the short side
    assert Crop("centre").box(800, 600, 256, Random(0)) == (100, 0, 600)
    assert Crop("random", smallest=0.5).held_out == Crop("centre")
    assert Crop("window", short_side=384).held_out.box(800, 600, 256, Random(0)) == (200, 100, 400)


def test_crop_options_that_fit_nothing_are_refused() -> None:
    for options, name in [
        ({"rule": "middle"}, "task.crop.rule=middle"),
        ({"rule": "random", "short_side": 9}, "task.crop.short_side=9"),
        ({"rule": "window", "smallest": 0.5}, "task.crop.smallest=0.5"),
    ]:
        with pytest.raises(InputError, match=name):
            Crop(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"task.crop.short_side=128 is less than the size 256"):
        Crop("window", short_side=128).box(800, 600, 256, Random(0))


def test_super_resolution_is_pillows_bicubic_of_an_area_mean() -> None:
    given = sample(3, 48, 32)
    derived = SuperResolution(image_size=16).give(given, Random(0))
    middle = given["image"][:, :, 8:40].reshape(3, 16, 2, 16, 2).astype(np.float64).mean((2, 4))  # SR3: exact areas
    assert np.abs(derived["image"] - middle).max() <= 0.5
    large = Image.fromarray(derived["image"].transpose(1, 2, 0))
    small = np.asarray(large.resize((4, 4), Image.Resampling.BICUBIC))
    assert np.array_equal(derived["low_resolution"], small.transpose(2, 0, 1))
    plain = cv2.resize(np.asarray(large), (4, 4), interpolation=cv2.INTER_CUBIC)
    assert not np.array_equal(small, plain)  # the kernel that does not antialias is another one
    with pytest.raises(InputError, match=r"task.factor=3 does not divide"):
        SuperResolution(image_size=16, factor=3)


def test_inpainting_pastes_the_known_pixels_bit_for_bit() -> None:
    task = Inpainting(image_size=256, masks="thin_256")
    derived = [task.give(sample(n, 300, 260), Random(n)) for n in range(2)]
    batch = {name: torch.from_numpy(np.stack([d[name] for d in derived])) for name in ("image", "mask")}
    assert batch["mask"].shape == (2, 1, 256, 256)
    drawn = torch.randn(2, 3, 256, 256)
    finished = task.finish(drawn.to(torch.bfloat16), batch)
    from ldmlab.nn.pixels import to_bytes

    known = (batch["mask"] == 0).expand(2, 3, 256, 256)
    assert torch.equal(to_bytes(finished)[known], batch["image"][known])
    assert torch.equal(finished[~known], drawn.to(torch.bfloat16).float()[~known])
    shades = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    kept = task.finish(torch.zeros(1, 3, 16, 16), {"image": shades, "mask": torch.zeros(1, 1, 16, 16)})
    assert torch.equal(to_bytes(kept), shades)


def test_stored_masks_follow_the_crop() -> None:
    task = Inpainting(image_size=20, masks="stored", held_out_masks="stored")
    stored = np.zeros((1, 40, 60), np.uint8)
    stored[:, :, :30] = 1
    given = sample(0, 60, 40, mask=stored) | {"image": 255 * (1 - stored).repeat(3, 0)}
    assert task.needs == task.held_out.needs == {"image", "mask"}
    for variant in (task, task.held_out):
        derived = variant.give({name: given[name] for name in ("image", "mask")}, Random(1))
        assert np.abs((1 - derived["mask"]) * 255.0 - derived["image"][:1]).max() < 128


def test_lamas_rule_for_test_masks() -> None:
    rule = LamaTest(image_size=256, masks="thick_256")
    left_out = 0
    for number in range(60):
        given = {"image": Scene(number, 320, 256).pixels}
        try:
            derived = rule.give(given, Random(number))
        except ValueError:
            left_out += 1
            continue
        assert 0 < derived["mask"].mean() <= 0.5
        assert derived["image"].shape == (3, 256, 256)
        starts = [s for s in range(65) if np.array_equal(given["image"][:, :, s : s + 256], derived["image"])]
        assert starts  # a window of the image, not resampled
    assert left_out <= 3  # 0.35 ^ 5 of them
    with pytest.raises(ValueError, match="none of 1 masks leaves 99% of the image"):
        LamaTest(image_size=256, candidates=1, largest_hole=0.01).give({"image": Scene(0, 256, 256).pixels}, Random(0))


def test_masks_of_another_size_keep_their_share() -> None:
    task = Inpainting(image_size=64, masks="thick_256")
    areas = [task.give({"image": Scene(0, 64, 64).pixels}, Random(n))["mask"].mean() for n in range(300)]
    assert np.mean(areas) == pytest.approx(0.4018, abs=3 * 0.2173 / 300**0.5)


def test_layout_keeps_images_with_enough_large_objects() -> None:
    task = Layout(image_size=16, least=2, most=3, smallest_area=0.05)
    large, small = {"class_id": 1, "box": [0.1, 0.1, 0.6, 0.6]}, {"class_id": 1, "box": [0.1, 0.1, 0.2, 0.2]}
    for boxes, kept in (([large], False), ([large, small], False), ([large] * 2, True), ([large] * 4, False)):
        assert task.keeps({"boxes": boxes}) is kept
    assert task.give({"boxes": [large, small]}, Random(0))["boxes"] == [large]
    with pytest.raises(ValueError, match="does not lie in"):
        task.keeps({"boxes": [{"class_id": 1, "box": [0.5, 0.1, 0.4, 0.2]}]})
    with pytest.raises(InputError, match=r"task.least=3 and task.most=2"):
        Layout(image_size=16, least=3, most=2)


def test_layout_shuffles_and_needs_no_image_without_a_crop() -> None:
    task, given = Layout(image_size=16), {"boxes": Scene(0, 48, 32, objects=4).boxes}
    assert task.needs == {"boxes"}
    assert Layout(image_size=16, crop=Crop("random")).needs == {"boxes", "image"}
    orders = {tuple(e["class_id"] for e in task.give(given, Random(n))["boxes"]) for n in range(20)}
    assert len(orders) > 1
    assert task.give(given, Random(0))["crop"] == list(WHOLE)
    assert sum(area(e["box"]) for e in task.give(given, Random(0))["boxes"]) == pytest.approx(
        sum(area(e["box"]) for e in given["boxes"])
    )


def test_semantic_labels() -> None:
    given = sample(0, 32, 32)
    assert Semantic(image_size=32, classes=CLASSES + 1).give(given, Random(0))["segmentation"].dtype == np.uint8
    with pytest.raises(ValueError, match="in a map of 2 classes"):
        Semantic(image_size=32, classes=2).give({**given, "segmentation": np.full((32, 32), 2)}, Random(0))
    labels = np.array([[255, 0], [1, 180]], np.uint8)
    told = Semantic(image_size=2, classes=183, unlabelled=255).give({"segmentation": labels}, Random(0))["segmentation"]
    assert told.tolist() == [[182, 0], [1, 180]]


def test_maps_that_do_not_lie_on_their_image_are_bad_samples() -> None:
    task = Inpainting(16, masks="stored", held_out_masks="stored")
    hole = np.zeros((1, 32, 48), np.uint8)
    for variant in (task, task.held_out):
        with pytest.raises(ValueError, match="its mask has no hole"):
            variant.give(sample(mask=hole), Random(0))
        with pytest.raises(ValueError, match="its mask has 48 x 30 pixels, the image 48 x 32"):
            variant.give(sample(mask=hole[:, 2:] + 1), Random(0))
    with pytest.raises(ValueError, match="its segmentation has 40 x 32 pixels"):
        Semantic(16, 9, crop=Crop()).give(sample(segmentation=np.zeros((32, 40), np.uint8)), Random(0))


def test_boxes_of_no_known_class_are_bad_samples() -> None:
    known, unknown = Layout(16, classes=CLASSES), Layout(16, classes=2)
    for number in range(9):
        known.give(sample(number), Random(0))
    with pytest.raises(ValueError, match=r"class_id \d of a box is not 0 \.\. 1 \(task\.classes\)"):
        [unknown.give(sample(number), Random(0)) for number in range(9)]
    with pytest.raises(ValueError, match="class_id -1 of a box"):
        Layout(16).give({"boxes": [{"class_id": -1, "box": [0, 0, 1, 1]}]}, Random(0))
