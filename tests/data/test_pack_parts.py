"""Masks, label maps and boxes are packed with their image, and lie on it where they lay before."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_maker import stored_samples

from ldmlab.annotations import centre_square, cropped
from ldmlab.app import cli
from ldmlab.data.decode import decode_image
from ldmlab.data.image_parts import decode_parts, packed_map
from ldmlab.data.image_sources import list_source
from ldmlab.data.pack_shards import PackOptions, PackResult, pack
from ldmlab.data.tars import tar_bytes
from ldmlab.data.transforms import Transform
from scenes import Scene

WIDE = (24, 16)
PARTS = ("segmentation", "mask", "boxes")


def packed(source: Path, out: Path, size: int | None = 16, rule: str = "centre", **choices: object) -> PackResult:
    return pack(list_source(source), out, PackOptions(Transform(size, rule)), workers=1, **choices)  # type: ignore


def write_folder(folder: Path, layout: str, count: int = 3, size: tuple[int, int] = WIDE) -> list[Scene]:
    """Scenes as people store them: maps beside images, in folders that a table names, or in a tar."""
    scenes = [Scene(number, *size, objects=2) for number in range(count)]
    folder.mkdir(parents=True)
    rows = []
    tar = b""
    for number, scene in enumerate(scenes):
        files = scene.files()
        row = {"file_name": f"{number}.png", "text": scene.caption, "boxes": scene.boxes}
        if layout == "tars":
            tar += b"".join(tar_bytes(f"{number}.{ending}", content) for ending, content in files.items())
            continue
        maps = {"mask": f"{number}.mask.png", "segmentation": f"{number}.seg.png"}
        if layout == "columns":
            maps = {name: f"{name}s/{number}.png" for name in maps}
            row |= {f"{name}_file_name": file for name, file in maps.items()}
        for name, file in {"": f"{number}.png", **maps}.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_bytes(files[{"mask": "mask.png", "segmentation": "seg.png"}.get(name, "png")])
        rows.append(row)
    if layout == "tars":
        (folder / "a.tar").write_bytes(tar + bytes(1024))
    elif layout == "csv":
        with open(folder / "metadata.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, ["file_name", "text", "boxes"])
            writer.writeheader()
            writer.writerows({**row, "boxes": json.dumps(row["boxes"])} for row in rows)
    elif layout != "plain":
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return scenes


@pytest.mark.parametrize("layout", ["table", "columns", "csv", "tars", "plain"])
@pytest.mark.parametrize(("rule", "size"), [("centre", 16), ("keep", None), ("sr3_area", 8), ("short_side", 8)])
def test_parts_lie_where_they_lay(tmp_path: Path, layout: str, rule: str, size: int | None) -> None:
    scenes = write_folder(tmp_path / "in", layout)
    result = packed(tmp_path / "in", tmp_path / "out", size, rule)
    assert (result.manifests["train"].total, result.bad) == (3, [])
    square = rule in ("centre", "sr3_area")
    region = (slice(None), slice(4, 20)) if square else (slice(None), slice(None))
    step = 1 if size in (16, None) else 2
    for key, sample in stored_samples(tmp_path / "out" / "train").items():
        scene = scenes[int(key)]
        parts = PARTS if layout != "plain" else PARTS[:2]
        found = decode_parts(sample, parts, None)
        offset = step // 2  # the pixel at the centre of each target pixel
        assert np.array_equal(found["segmentation"], np.asarray(scene.labels)[region][offset::step, offset::step])
        left = np.zeros((16, 24), np.uint8)
        left[:8, :12] = 1  # the mask of a scene
        assert np.array_equal(found["mask"][0], left[region][offset::step, offset::step])
        if step == 1:
            assert np.array_equal(decode_image(sample, None, (255, 255, 255)), scene.pixels[(slice(None), *region)])
        if "boxes" in parts:
            place = centre_square(*WIDE) if square else [0, 0, 1, 1]
            assert found["boxes"] == (cropped(scene.boxes, place) if square else scene.boxes)
            assert np.allclose(found["crop"], place)


def test_packing_again_keeps_everything(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", "table")
    packed(tmp_path / "in", tmp_path / "once", None, "keep")
    packed(tmp_path / "once" / "train", tmp_path / "twice", None, "keep")
    once, twice = stored_samples(tmp_path / "once" / "train"), stored_samples(tmp_path / "twice" / "train")
    for key, sample in once.items():
        for ending in ("webp", "mask.png", "seg.png"):
            assert sample[ending] == twice[key][ending]


def test_maps_are_no_images_and_orphans_are_named(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", "plain")
    (tmp_path / "in" / "2.png").unlink()
    Image.new("RGB", (9, 9)).save(tmp_path / "in" / "a.jpg")
    result = packed(tmp_path / "in", tmp_path / "out", None, "keep", max_bad=0.9)
    assert sorted(result.bad) == [(f"2.{name}.png", "has no image next to it") for name in ("mask", "seg")]
    assert sorted(stored_samples(tmp_path / "out" / "train")) == ["0", "1", "a"]
    assert "mask.png" not in stored_samples(tmp_path / "out" / "train")["a"]


def test_a_table_may_name_images_elsewhere(tmp_path: Path) -> None:
    write_folder(tmp_path / "elsewhere", "plain")
    (tmp_path / "in").mkdir()
    rows = [{"file_name": str(tmp_path / "elsewhere" / f"{n}.png"), "text": "x"} for n in range(3)]
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    packed(tmp_path / "in", tmp_path / "out")
    assert all("seg.png" in sample for sample in stored_samples(tmp_path / "out" / "train").values())


def _png(values: np.ndarray | Image.Image) -> bytes:
    file = io.BytesIO()
    (values if isinstance(values, Image.Image) else Image.fromarray(values)).save(file, "PNG")
    return file.getvalue()


def test_bad_maps_are_told_with_their_image(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_folder(folder, "columns", count=8)
    (folder / "masks" / "0.png").unlink()
    (folder / "masks" / "1.png").write_bytes(b"no image")
    (folder / "masks" / "2.png").write_bytes(_png(np.ones((16, 24), np.uint8)))
    (folder / "segmentations" / "3.png").write_bytes(_png(np.zeros((8, 12), np.uint8)))
    (folder / "segmentations" / "4.png").write_bytes(_png(np.zeros((16, 24, 3), np.uint8)))
    (folder / "masks" / "5.png").write_bytes(_png(np.zeros((16, 24, 4), np.uint8)))
    whole = (folder / "segmentations" / "6.png").read_bytes()
    (folder / "segmentations" / "6.png").write_bytes(whole[:60])
    reasons = dict(packed(folder, tmp_path / "out", max_bad=0.9).bad)
    assert reasons.pop("6.png").startswith("its label map cannot be read (")
    assert reasons == {
        "0.png": "its 0.png is missing",
        "1.png": "its mask cannot be read (no PNG)",
        "2.png": "its mask's brightest pixel is 1; holes are white (255)",
        "3.png": "its label map has 12 x 8 pixels, the image 24 x 16",
        "4.png": "its label map has several channels; store one number a pixel",
        "5.png": "its mask is partly transparent; store black and white",
    }


def test_numbers_of_any_mode_survive() -> None:
    def again(image: Image.Image | np.ndarray, ending: str = "seg.png") -> np.ndarray:
        shape = (4, 4)
        return np.asarray(Image.open(io.BytesIO(packed_map(_png(image), ending, shape, shape, True))))

    numbers = np.arange(16, dtype=np.uint16).reshape(4, 4)
    palette = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    palette.putdata(list(range(16)))
    assert np.array_equal(again(palette), numbers)
    assert np.array_equal(again(numbers * 4000), numbers * 4000)
    assert np.array_equal(again(Image.fromarray(numbers % 2 == 1)), numbers % 2)
    white = Image.fromarray(np.where(numbers % 3 == 0, 255, 0).astype(np.uint8))
    for mode in ("L", "RGB", "RGBA", "1", "P"):
        assert np.array_equal(again(white.convert(mode), "mask.png"), np.asarray(white))
    turned = Image.fromarray(np.arange(8, dtype=np.uint8).reshape(4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    turned.save(file, "PNG", exif=exif)
    upright = packed_map(file.getvalue(), "seg.png", (4, 2), (4, 2), False)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(upright))), np.rot90(np.asarray(turned), -1))


def test_the_command_packs_what_a_task_reads(tmp_path: Path) -> None:
    write_folder(tmp_path / "in", "columns")
    words = ["pack", str(tmp_path / "in"), str(tmp_path / "out"), "--size", "16", "--workers", "1"]
    assert cli.dispatch(words) == 0
    with tarfile.open(tmp_path / "out" / "train" / "train-000000.tar") as tar:
        names = tar.getnames()
    assert names[:4] == ["0.webp", "0.json", "0.mask.png", "0.seg.png"]
