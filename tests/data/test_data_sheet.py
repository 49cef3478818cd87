"""`ldmlab data-sheet`: what is counted, repeats against a search of all pairs, and one hash for equal data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from ldmlab.app.cli import dispatch
from ldmlab.data.data_sheet import carry_sheet, data_record, find_sheet
from ldmlab.data.manifest import read_manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.data.splits import NEAR_BITS, near_pairs, perceptual_hash, repeats
from refusals import refusal

RANDOM = np.random.default_rng(0)


def image(seed: int, side: int = 32) -> Image.Image:
    """Smooth, so that it looks the same at other sizes."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def packed(folder: Path, split: str, images: dict[str, Image.Image], **fields: object) -> Path:
    """Shards of these images; captions count them."""
    source = folder / f"{split}_source"
    source.mkdir(parents=True)
    rows = []
    for number, (name, one) in enumerate(images.items()):
        one.save(source / f"{name}.png")
        rows.append({"file_name": f"{name}.png", "caption": f"A thing, number {number % 2}", **fields})
    (source / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--split", split, "--size", "32", "--workers", "1", "--origin", "drawn", "--licence", "CC0"]
    assert dispatch(["pack", str(source), str(folder / "out"), *words]) == 0
    return folder / "out" / split


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """In train an image twice; in val one of train, and one of train in a quarter of the pixels."""
    train = {f"t{seed}": image(seed) for seed in range(6)} | {"again": image(0)}
    val = {"other": image(9), "same": image(1), "small": image(2).resize((16, 16)).resize((32, 32))}
    return [packed(tmp_path, "train", train, licence="MIT"), packed(tmp_path, "val", val)]


def sheet(*shards: Path, words: tuple[str, ...] = ()) -> dict:
    assert dispatch(["data-sheet", *map(str, shards), "--workers", "1", *words]) == 0
    return json.loads((shards[0] / "data_sheet.json").read_text())


def test_what_a_sheet_counts(shards: list[Path]) -> None:
    found = sheet(*shards)
    assert {name: split["images"] for name, split in found["splits"].items()} == {"train": 7, "val": 3}
    assert found["licences"] == {"MIT": 7, "CC0": 3}  # a field, and what the manifest of the others has
    assert found["sources"] == {"drawn": 10}
    captions = found["splits"]["train"]["captions"]
    assert (captions["count"], captions["distinct"], captions["images_without"]) == (7, 2, 0)
    assert captions["words"] == {"least": 4, "median": 4, "most": 4}
    assert captions["frequent_words"] == {"a": 7, "number": 7, "thing": 7, "0": 4, "1": 3}
    duplicates = found["duplicates"]
    assert duplicates["exact"] == {"train": {"train": 2, "val": 1}, "val": {"train": 1, "val": 0}}
    assert duplicates["near"] == {"train": {"train": 2, "val": 2}, "val": {"train": 2, "val": 0}}
    assert ["train", "t2", "val", "small"] in duplicates["near_examples"]
    page = (shards[1] / "data_sheet.md").read_text()
    assert found["hash"] in page
    assert "were not measured" in page


def test_equal_shards_have_an_equal_hash(shards: list[Path], tmp_path: Path) -> None:
    first = sheet(*shards)["hash"]
    copies = [Path(shutil.copytree(one, tmp_path / "copy" / one.name)) for one in shards]
    again = sheet(*copies)
    assert again["hash"] == first
    assert again["made"]["time_utc"]
    assert sheet(shards[0])["hash"] != first


def test_a_run_finds_the_sheet_of_its_shards_alone(shards: list[Path], tmp_path: Path) -> None:
    found, manifest = sheet(*shards), read_manifest(shards[0])
    assert find_sheet([shards[0]], manifest) == (found, None)
    other = packed(tmp_path / "other", "train", {"a": image(20), "b": image(21)})
    shutil.copy(shards[0] / "data_sheet.json", other)
    assert find_sheet([other], read_manifest(other)) == (None, other / "data_sheet.json")
    damaged = json.loads((shards[0] / "data_sheet.json").read_text()) | {"licences": {"mine": 10}}
    (shards[0] / "data_sheet.json").write_text(json.dumps(damaged))
    assert "is no data sheet" in refusal(lambda: find_sheet([shards[0]], manifest))


def test_a_run_records_the_sheet_of_its_images_through_its_latents(shards: list[Path], tmp_path: Path) -> None:
    data, found = ShardData(str(shards[0]), str(shards[1]), 32), sheet(*shards)
    record, notes = data_record(data, "images")
    assert record["train"]["sheet"] == {name: found[name] for name in ("hash", "licences", "sources")}
    assert (record["val"]["images"], record["val"]["licence"], notes) == (3, "CC0", [])
    manifest = read_manifest(shards[0])
    latents = replace(manifest, kind="latents", latents={"source_hash": manifest.hash})
    carry_sheet(shards[0], tmp_path)
    assert find_sheet([tmp_path], latents) == (found, None)
    shutil.copy(tmp_path / "data_sheet.json", packed(tmp_path / "other", "train", {"a": image(20)}))
    notes = data_record(replace(data, train=str(tmp_path / "other" / "out" / "train")), "images")[1]
    assert len(notes) == 1
    assert "is the sheet of other shards" in notes[0]


def test_fields_are_counted_by_name(shards: list[Path]) -> None:
    words = ("--count", "caption", "--licence-field", "nothing")
    found = sheet(*shards, words=words)
    assert found["counts"] == {"caption": {"A thing, number 0": 6, "A thing, number 1": 4}}
    assert found["licences"] == {"CC0": 10}
    assert "is not a folder" in refusal(lambda: dispatch(["data-sheet", str(shards[0] / "no")]))
    told = refusal(lambda: dispatch(["data-sheet", str(shards[0]), "--count", "captoin"]))
    assert told == "--count 'captoin': no image of SHARDS has this field; did you mean caption?"


def test_the_perceptual_hash_is_that_of_its_definition() -> None:
    for seed in range(20):
        grey = np.asarray(image(seed, 40).convert("L").resize((32, 32), Image.Resampling.LANCZOS), float)
        low = dctn(grey, type=2)[:8, :8]
        expected = "".join("01"[int(bit)] for bit in (low > np.median(low)).ravel())
        assert f"{perceptual_hash(image(seed, 40)):064b}" == expected
    flat = {perceptual_hash(Image.new("RGB", (20, 20), (value, value, value))) for value in (3, 128, 255)}
    assert len(flat) == 1


def test_near_pairs_are_those_of_all_pairs() -> None:
    """Hashes around a few centres, so that pairs at every small distance occur."""
    centres = RANDOM.integers(0, 2**64, 20, np.uint64)
    flips = np.bitwise_xor.reduce(np.uint64(1) << RANDOM.integers(0, 64, (400, 2), np.uint64), 1)
    hashes = np.unique(centres[RANDOM.integers(0, 20, 400)] ^ flips)
    apart = np.bitwise_count(hashes[:, None] ^ hashes[None])
    expected = {(i, j) for i, j in np.argwhere(apart <= NEAR_BITS).tolist() if i < j}
    found = {tuple(sorted(pair)) for pairs in near_pairs(hashes) for pair in np.stack(pairs, 1).tolist()}
    assert found == expected
    assert len(expected) > 100
    table, _ = repeats({"a": hashes, "b": hashes[:50]}, near=True)
    near = apart <= NEAR_BITS
    assert table["a"]["b"] == int(near[:, :50].any(1).sum())
    assert table["a"]["a"] == int((near.sum(1) > 1).sum())
    assert table["b"]["b"] == int((near[:50, :50].sum(1) > 1).sum())
