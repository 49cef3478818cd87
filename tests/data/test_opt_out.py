"""`ldmlab pack --exclude`: by URL, file and look; counted in the manifest, resumed with the same list alone."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmlab.app.cli import dispatch
from ldmlab.data import opt_out
from ldmlab.data.manifest import read_manifest
from ldmlab.data.opt_out import OptOut, one_form
from ldmlab.data.pack_images import Encoding, encode_part
from ldmlab.data.shards import ShardReader
from ldmlab.data.splits import perceptual_hash
from ldmlab.data.transforms import Transform
from refusals import refusal

PLACE = "https://example.org/{}.png"
Pack = Callable[..., int]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Eight images with their addresses; image 3 is image 2 once more, at half the size."""
    (tmp_path / "in").mkdir()
    rows = []
    for number in range(8):
        small = np.random.default_rng(2 if number == 3 else number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        side = 20 if number == 3 else 40
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(tmp_path / "in" / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "caption": str(number), "url": PLACE.format(number)})
    (tmp_path / "in" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "in"


@pytest.fixture
def pack(source: Path, tmp_path: Path) -> Pack:
    def run(*words: object, lines: str | None = None, workers: int = 1) -> int:
        if lines is not None:
            (tmp_path / "list.txt").write_text(lines)
            words = ("--exclude", tmp_path / "list.txt", *words)
        return dispatch(["pack", str(source), str(tmp_path / "out"), "--workers", str(workers), *map(str, words)])

    return run


def captions(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    reader = ShardReader(folder, manifest)
    found = [reader.read(shard, i)[1]["json"] for shard, one in enumerate(manifest.shards) for i in range(one.samples)]
    return sorted(json.loads(content)["caption"] for content in found)


@pytest.mark.parametrize("workers", [1, 2])
def test_listed_images_are_left_out_and_counted(
    source: Path, tmp_path: Path, pack: Pack, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file = hashlib.sha256((source / "1.png").read_bytes()).hexdigest().upper()
    look = f"{perceptual_hash(Image.open(source / '2.png')):016x}"
    lines = f"# opted out\n{PLACE.format(0)}\n\n{file}\n{look}\n{PLACE.format(99)}\n"
    assert pack("--size", 16, lines=lines, workers=workers) == 0
    assert captions(tmp_path / "out" / "train") == ["4", "5", "6", "7"]
    record = read_manifest(tmp_path / "out" / "train").extra["opt_out"]
    assert record["left_out"] == {"url": 1, "sha256": 1, "perceptual hash": 2}
    assert record["entries"] == 4
    assert record["sha256"] == hashlib.sha256(lines.encode()).hexdigest()
    assert "4 images left out" in capsys.readouterr().err
    assert dispatch(["data-sheet", str(tmp_path / "out" / "train"), "--workers", "1"]) == 0
    assert "list.txt" in (tmp_path / "out" / "train" / "data_sheet.md").read_text()


def test_the_distance_of_looks_is_an_option(source: Path, tmp_path: Path, pack: Pack) -> None:
    look = f"{perceptual_hash(Image.open(source / '2.png')) ^ 0b1111:016x}"  # 4 bits off
    assert pack("--size", 16, lines=look) == 0
    assert len(captions(tmp_path / "out" / "train")) == 8
    words = ["--exclude", str(tmp_path / "list.txt"), "--exclude-distance", "4", "--workers", "1", "--size", "16"]
    assert dispatch(["pack", str(source), str(tmp_path / "far"), *words]) == 0
    assert "2" not in captions(tmp_path / "far" / "train")


@pytest.mark.parametrize(
    ("listed", "field"),
    [
        ("HTTPS://Example.ORG/a/1.png", "https://example.org/a/1.png"),
        ("https://example.org:443/%61/1%2f.png", "https://example.org/a/1%2F.png"),
        ("https://example.org/a b/ü.png", "https://example.org/a%20b/%C3%BC.png"),
        ("http://example.org", "http://example.org:80/"),
        ("https://example.org/1.png#top   # mine", "https://example.org/1.png"),
        ("https://example.org/1.png?size=2", " https://example.org/1.png?size=2 "),
        ("https://example.org:/b/../a/./1.png?", "https://ex%61mple.org/a/1.png"),
        ("https://example.org/../a/%2E%2E/..", "https://example.org"),
        ("https://MÜLLER.example/1", "https://müller.example/1"),
    ],
)
def test_urls_match_in_any_equivalent_form(listed: str, field: str) -> None:
    assert one_form(listed) == one_form(field)
    assert one_form(one_form(listed)) == one_form(listed)


@pytest.mark.parametrize("other", ["http://a.org/1", "https://a.org/1/", "https://a.org/1?b", "https://a.org/%2f1"])
def test_urls_of_different_files_stay_different(other: str) -> None:
    assert one_form("https://a.org/1") != one_form(other)
    assert one_form("s3://bucket/a#1") != one_form("s3://bucket/a#2")


def test_half_a_surrogate_pair_in_a_url_is_no_fault_of_the_image() -> None:
    assert one_form("https://a.org/\ud800") == "https://a.org/%ED%A0%80"


def test_all_rows_of_a_listed_file_are_left_out(source: Path, tmp_path: Path, pack: Pack) -> None:
    """A second caption of image 0 in a row without URL, and a row with a list of URLs."""
    with open(source / "metadata.jsonl", "a") as table:
        table.write('\n{"file_name": "0.png", "caption": "again"}')
        table.write(f'\n{{"file_name": "./1.png", "caption": "mirrored", "urls": ["{PLACE.format(98)}"]}}')
    assert pack("--size", 16, lines=f"{PLACE.format(0)}\n{PLACE.format(98)}") == 0
    assert captions(tmp_path / "out" / "train") == ["2", "3", "4", "5", "6", "7"]
    assert read_manifest(tmp_path / "out" / "train").extra["opt_out"]["left_out"]["url"] == 4


def test_a_list_that_changes_while_it_is_in_use_stops_the_pack(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(PLACE.format(0))
    listed = OptOut.of(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(PLACE.format(1))
    begun = replace(listed, distance=4)  # as a worker gets it
    opt_out._read.cache_clear()
    assert "was changed while it was in use" in refusal(lambda: encode_part([], Transform(16), Encoding(), 0, begun))


def test_a_list_without_a_match_is_warned_of(pack: Pack, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack("--size", 16, lines=PLACE.format(99)) == 0
    assert "matched no image" in capsys.readouterr().err


def test_another_list_does_not_continue_a_pack(pack: Pack, tmp_path: Path) -> None:
    assert pack("--size", 16, lines=PLACE.format(0)) == 0
    (tmp_path / "out" / "train" / "manifest.json").unlink()
    assert "exclude.sha256" in refusal(lambda: pack("--size", 16, lines=PLACE.format(1)))
    assert "exclude" in refusal(lambda: pack("--size", 16))


def test_what_a_pack_writes_holds_no_path_of_this_machine(source: Path, pack: Pack, tmp_path: Path) -> None:
    (source / "7.png").unlink()
    os.mkfifo(source / "7.png")
    assert pack("--size", 16, "--max-bad", 0.5, lines=PLACE.format(0)) == 0
    assert json.loads((tmp_path / "out" / "train" / "bad.json").read_text())[0]["reason"] == "not a regular file"
    plan = tmp_path / "out" / "train" / "plan.json"
    new = json.loads(plan.read_text())
    assert new["options"]["exclude"]["path"] == "list.txt"
    assert not [path for path in plan.parent.iterdir() if str(tmp_path).encode() in path.read_bytes()]
    old = {**new, "options": {**new["options"], "exclude": {**new["options"]["exclude"], "path": "/home/me/list.txt"}}}
    plan.write_text(json.dumps(old))
    (plan.parent / "manifest.json").unlink()
    assert pack("--size", 16, "--max-bad", 0.5, lines=PLACE.format(0)) == 0  # begun by a version that kept it
    assert json.loads(plan.read_text()) == new


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ("example.org", "line 1 (example.org) is no URL"),
        ("# nothing\n", "lists nothing"),
        (f"{PLACE}\nabc", "line 2 (abc)"),
    ],
)
def test_a_list_that_cannot_be_used(lines: str, sentence: str, pack: Pack, tmp_path: Path) -> None:
    assert sentence in refusal(lambda: pack(lines=lines))
    assert not (tmp_path / "out").exists()


def test_options_without_effect_are_refused(pack: Pack, tmp_path: Path) -> None:
    assert "give --exclude FILE too" in refusal(lambda: pack("--exclude-distance", 2))
    assert "must be in 0 .. 16" in refusal(lambda: pack("--exclude-distance", 17, lines=PLACE))
    assert "cannot be read" in refusal(lambda: pack("--exclude", tmp_path / "none.txt"))


def test_a_sheet_of_shards_of_which_one_is_missing_is_not_written(pack: Pack, tmp_path: Path) -> None:
    assert pack("--size", 16, lines=PLACE.format(0)) == 0
    folder = tmp_path / "out" / "train"
    words = ["data-sheet", str(folder), "--workers", "1"]
    (tmp_path / "file").write_text("mine")
    next(folder.glob("*.tar")).unlink()
    place = refusal(lambda: dispatch([*words, "--out", str(tmp_path / "file")]))
    assert "file cannot be written" in place  # before the images are looked at
    assert "SHARDS lack train-000000.tar" in refusal(lambda: dispatch(words))
    assert not (folder / "data_sheet.json").exists()
