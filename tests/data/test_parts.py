"""What lies on an image travels with it: decoded, mirrored, cropped, left out, and the same in any worker."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ldmlab.annotations import centre_square, cropped, mirrored, within
from ldmlab.app import cli
from ldmlab.data.encode_shards import LatentSettings, encode
from ldmlab.data.image_parts import centre_cropped, decode_parts
from ldmlab.data.loaders import collate
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.tasks.crop import Crop
from ldmlab.tasks.inpainting import Inpainting
from ldmlab.tasks.layout import Layout
from ldmlab.tasks.semantic import Semantic
from ldmlab.tasks.super_resolution import SuperResolution
from scenes import CLASSES, Scene, write_scenes

WIDE = (24, 16)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of wide scenes; images 1 and 4 of them hold one object only."""
    folder = tmp_path_factory.mktemp("parts")
    for split in ("train", "val"):
        write_scenes(folder / split, 8, WIDE, objects=[2, 1, 3, 2, 1, 4, 2, 3])
    return folder


def data(root: Path, **options: object) -> ShardData:
    return ShardData(**{"train": f"{root}/train", "val": f"{root}/val", "image_size": 16, "workers": 0, **options})


def test_crops_compose_and_mirror() -> None:
    boxes = Scene(2, 40, 30).boxes
    outer, inner = [0.1, 0.2, 0.9, 0.8], [0.25, 0.0, 0.75, 1.0]
    twice, once = cropped(cropped(boxes, outer), inner), cropped(boxes, within(inner, outer))
    assert [b["class_id"] for b in twice] == [b["class_id"] for b in once]
    assert np.allclose([b["box"] for b in twice], [b["box"] for b in once])
    assert np.allclose([b["box"] for b in mirrored(mirrored(boxes))], [b["box"] for b in boxes])
    assert cropped([{"class_id": 0, "box": [0.0, 0.0, 0.1, 0.1]}], outer) == []
    assert centre_square(40, 30) == [5 / 40, 0, 35 / 40, 1]


def test_boxes_and_maps_follow_the_centre_square(root: Path) -> None:
    sample = data(root).with_task(Layout(image_size=16)).val_dataset()[0]
    scene = Scene(0, *WIDE, objects=2)
    assert np.allclose(sample["crop"], [4 / 24, 0, 20 / 24, 1])
    boxes = cropped(scene.boxes, centre_square(*WIDE))
    assert sorted(b["box"] for b in sample["boxes"]) == sorted(b["box"] for b in boxes)
    labels = data(root).with_task(Semantic(image_size=16, classes=CLASSES + 1)).val_dataset()[0]
    assert np.array_equal(labels["segmentation"], np.asarray(scene.labels)[:, 4:20])
    assert np.array_equal(labels["image"], scene.pixels[:, :, 4:20])


def test_a_mirrored_image_has_mirrored_parts(root: Path) -> None:
    plain, turned = (
        data(root, flip=flip).with_task(Semantic(16, CLASSES + 1)).train_dataset() for flip in (False, True)
    )
    boxes = data(root, flip=True).with_task(Layout(16, least=1)).train_dataset()
    whole = data(root).with_task(Layout(16, least=1)).train_dataset()
    flipped = 0
    for position in range(8):
        one, other = plain[position], turned[position]
        same = np.array_equal(one["image"], other["image"])
        flipped += not same
        for name in ("image", "segmentation"):
            assert np.array_equal(one[name] if same else one[name][..., ::-1], other[name])
        original, found = whole[position], boxes[position]
        expected = original["boxes"] if same else mirrored(original["boxes"])
        assert np.allclose(sorted(b["box"] for b in found["boxes"]), sorted(b["box"] for b in expected))
        assert np.allclose(found["crop"], [4 / 24, 0, 20 / 24, 1])
    assert 0 < flipped < 8


def test_flips_and_masks_are_drawn_apart(root: Path) -> None:
    task = Inpainting(16, masks="thin_256", crop=Crop("centre"))
    one, other = (data(root, flip=flip).with_task(task).train_dataset() for flip in (False, True))
    for position in range(8):
        assert np.array_equal(one[position]["mask"], other[position]["mask"])  # made on what is seen, flipped or not


def test_draws_belong_to_seed_epoch_and_key(root: Path) -> None:
    task = SuperResolution(8, crop=Crop("random", smallest=0.5))
    stream = data(root, image_size=8).with_task(task).train_dataset()
    again = data(root, image_size=8, workers=2).with_task(task)
    loaded = next(iter(again.train_loader(micro_batch=8)))
    first = {stream[position]["key"]: stream[position] for position in range(8)}
    assert loaded["image"].shape == (8, 3, 8, 8)
    assert loaded["low_resolution"].shape == (8, 3, 2, 2)
    for row, key in enumerate(loaded["key"]):
        assert np.array_equal(loaded["image"][row], first[key]["image"])
    later = {stream[position]["key"]: stream[position] for position in range(8, 16)}
    assert any(not np.array_equal(first[key]["image"], later[key]["image"]) for key in first)
    other = data(root, image_size=8, seed=1).with_task(task).train_dataset()
    seeded = {other[position]["key"]: other[position] for position in range(8)}
    assert any(not np.array_equal(first[key]["image"], seeded[key]["image"]) for key in first)


def test_held_out_images_are_the_middle_and_stay(root: Path) -> None:
    held_out = data(root, flip=True).with_task(Semantic(16, CLASSES + 1, crop=Crop("random"))).val_dataset()
    assert np.array_equal(held_out[3]["image"], Scene(3, *WIDE, objects=2).pixels[:, :, 4:20])
    assert np.array_equal(held_out[3]["segmentation"], np.asarray(Scene(3, *WIDE, objects=2).labels)[:, 4:20])


@pytest.mark.parametrize("balance", [None, "caption"])
def test_images_that_a_task_leaves_out_never_come(root: Path, balance: str | None) -> None:
    layout = data(root, balance=balance, mix=2).with_task(Layout(16, least=2, most=3))
    kept = ["00000", "00002", "00003", "00006", "00007"]
    held_out, stream = layout.val_dataset(), layout.train_dataset()
    assert [held_out[position]["key"] for position in range(len(held_out))] == kept
    assert len(stream) == 5
    keys = [stream[position]["key"] for position in range(10)]
    assert set(keys) == set(kept)
    if balance is None:
        assert sorted(keys[:5]) == sorted(keys[5:]) == kept
    with pytest.raises(InputError, match="leaves out all images"):
        data(root).with_task(Layout(16, least=20)).val_dataset()


def test_decoded_images_are_cached_as_the_task_needs_them(root: Path, tmp_path: Path) -> None:
    task = SuperResolution(8, crop=Crop("random", smallest=0.5))
    with pytest.raises(InputError, match=r"data.cache=true with a task that crops"):
        data(root, image_size=8, cache=True).with_task(task).train_dataset()
    for split in ("train", "val"):
        write_scenes(tmp_path / split, 4, (20, 20))
    cached, read = (
        data(tmp_path, image_size=8, cache=cache).with_task(task).train_dataset() for cache in (True, False)
    )
    for position in (0, 3, 2, 3, 4):
        assert np.array_equal(cached[position]["low_resolution"], read[position]["low_resolution"])


def test_missing_parts_are_named_before_any_work(root: Path, tmp_path: Path) -> None:
    from shard_maker import write_shards

    for split in ("train", "val"):
        write_shards(tmp_path / split, [2], split=split)
    bare = data(tmp_path, image_size=8, fields=())
    with pytest.raises(InputError, match=r"starts from segmentation, but sample 00000.tar.0. has no file KEY.seg.png"):
        bare.with_task(Semantic(8)).val_dataset()
    with pytest.raises(InputError, match=r"starts from boxes, but sample .* has no field boxes"):
        bare.with_task(Layout(8, least=0)).val_dataset()


def test_a_batch_holds_arrays_and_lists(root: Path) -> None:
    dataset = data(root).with_task(Layout(16, crop=Crop("random"))).val_dataset()
    batch = collate([dataset[0], dataset[1], {"skipped": ["bad"]}], dataset.template)
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["image"].dtype == torch.uint8
    assert [len(boxes) for boxes in batch["boxes"]] == [len(dataset[0]["boxes"]), len(dataset[1]["boxes"])]
    assert len(batch["crop"]) == 2
    empty = collate([{"skipped": ["bad"]}], dataset.template)
    assert empty["image"].shape == (0, 3, 16, 16)
    assert empty["boxes"] == []


def moments(images: Tensor) -> Tensor:
    return images[:, :, ::4, ::4].float() / 255


@pytest.mark.parametrize("carry", [False, True])
def test_latents_keep_boxes_and_maps(root: Path, tmp_path: Path, carry: bool) -> None:
    settings = LatentSettings(
        fingerprint="f", latent_channels=3, downsampling=4, image_size=16, mirrored=True, carries_images=carry
    )
    for split in ("train", "val"):
        encode(root / split, tmp_path / split, moments, settings)
    latents = data(root, latents=str(tmp_path), flip=True)
    for task in (Layout(16, least=1), Semantic(16, CLASSES + 1)):
        for train in (False, True):
            cached, online = latents.with_task(task), replace(latents, latents=None).with_task(task)
            left, right = (d.train_dataset() if train else d.val_dataset() for d in (cached, online))
            for position in range(8):
                one, other = left[position], right[position]
                assert np.allclose(one["moments"], moments(torch.as_tensor(other["image"])[None])[0], atol=1e-3)
                for name in one.keys() & {"boxes", "crop"}:
                    assert repr(one[name]) == repr(other[name])
                if "segmentation" in one:
                    assert np.array_equal(one["segmentation"], other["segmentation"])
    with pytest.raises(InputError, match=r"set data.latents=null and give the first stage as from_run"):
        latents.with_task(Inpainting(16)).val_dataset()


def test_broken_parts_are_bad_samples() -> None:
    files = Scene(0, *WIDE).files()
    assert decode_parts(files, {"mask"}, None)["mask"].shape == (1, 16, 24)
    assert decode_parts(files, {"mask"}, None)["mask"][0, :, 12:].sum() == 0
    with pytest.raises(ValueError, match="has several channels"):
        decode_parts({**files, "seg.png": files["png"]}, {"segmentation"}, None)
    with pytest.raises(ValueError, match="boxes are a dict"):
        decode_parts({**files, "json": b'{"boxes": {}}'}, {"boxes"}, None)
    with pytest.raises(KeyError, match=r"no file KEY.seg.png"):
        decode_parts({"json": b"{}"}, {"segmentation"}, None)
    assert centre_cropped({"boxes": [], "crop": [0, 0, 0.5, 1]}, 20, 10)["crop"] == [0.125, 0, 0.375, 1]


@pytest.mark.parametrize("crop", ["centre", "keep"])
def test_packed_boxes_lie_on_the_packed_image(tmp_path: Path, crop: str) -> None:
    scenes = [Scene(number, *WIDE, objects=2) for number in range(3)]
    (tmp_path / "images").mkdir()
    rows = []
    for number, scene in enumerate(scenes):
        scene.image.save(tmp_path / "images" / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": scene.caption, "boxes": scene.boxes}))
    (tmp_path / "images" / "metadata.jsonl").write_text("\n".join(rows))
    size = ["--size", "16"] if crop == "centre" else []
    words = ["pack", str(tmp_path / "images"), str(tmp_path / "out"), "--crop", crop, *size, "--workers", "1"]
    assert cli.dispatch(words) == 0
    folder = next((tmp_path / "out").glob("**/manifest.json")).parent
    packed = data(tmp_path, train=str(folder), val=str(folder), fields=())
    dataset = packed.with_task(Layout(16, least=0, shuffle=False)).val_dataset()
    assert len(dataset) == 3
    for sample in (dataset[position] for position in range(3)):
        number = int(re.findall(r"\d+", sample["key"])[-1])
        assert np.array_equal(sample["image"], scenes[number].pixels[:, :, 4:20])
        assert sample["boxes"] == cropped(scenes[number].boxes, centre_square(*WIDE))
        assert np.allclose(sample["crop"], centre_square(*WIDE))
