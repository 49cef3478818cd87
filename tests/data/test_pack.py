"""Packing a stranger's images: same bytes for any workers, faults named, kills survived, folders respected."""

import argparse
import errno
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shard_maker import stored_samples

from ldmlab.app.commands import pack as command
from ldmlab.data.image_sources import list_source
from ldmlab.data.manifest import check_shards, read_manifest
from ldmlab.data.pack_images import Encoding
from ldmlab.data.pack_shards import PackOptions, PackResult, pack
from ldmlab.data.splits import SplitRule
from ldmlab.data.transforms import Transform
from ldmlab.disks import FileLock
from ldmlab.errors import InputError

ROOT = Path(__file__).parents[2]


def _images(folder: Path, count: int, side: int = 24) -> Path:
    random = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        Image.fromarray(random.integers(0, 256, (side, side + 7, 3), dtype=np.uint8)).save(folder / f"{number:04d}.png")
        rows.append({"file_name": f"{number:04d}.png", "caption": f"番号 {number}", "kind": "ab"[number % 2]})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return folder


def _options(**choices: object) -> PackOptions:
    return PackOptions(**({"transform": Transform(16), "shard_size": 40} | choices))  # type: ignore[arg-type]


def _pack(source: Path, out: Path, options: PackOptions | None = None, **choices: object) -> PackResult:
    return pack(list_source(source), out, options or _options(), **({"workers": 1} | choices))  # type: ignore[arg-type]


def _tars(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.tar"))}


@pytest.mark.slow
def test_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 130)
    options = _options(split=SplitRule(0.2, stratify="kind"), class_field="kind")
    first = _pack(source, tmp_path / "one", options, workers=1)
    _pack(source, tmp_path / "three", options, workers=3)
    assert _tars(tmp_path / "one") == _tars(tmp_path / "three")
    assert {split: manifest.total for split, manifest in first.manifests.items()} == {"train": 104, "val": 26}
    assert [shard.samples for shard in first.manifests["train"].shards] == [40, 40, 24]
    for split, manifest in first.manifests.items():
        assert read_manifest(tmp_path / "three" / split).hash == manifest.hash
        check_shards(tmp_path / "one" / split, manifest, sha256=True)
    assert first.manifests["train"].classes == ["a", "b"]


def test_offsets_and_contents(tmp_path: Path) -> None:
    _pack(_images(tmp_path / "in", 50), tmp_path / "out")
    samples = stored_samples(tmp_path / "out/train")
    assert sorted(samples) == [f"{number:04d}" for number in range(50)]
    sample = samples["0041"]
    fields = json.loads(sample["json"])
    assert fields["caption"] == "番号 41"
    assert "番号 41" in sample["json"].decode()  # readable, not escaped
    assert (fields["original_width"], fields["original_height"]) == (31, 24)
    packed = Image.open(io.BytesIO(sample["webp"]))
    with Image.open(tmp_path / "in/0041.png") as original:
        assert packed.convert("RGB").tobytes() == Transform(16)(original).tobytes()  # lossless
    with tarfile.open(tmp_path / "out/train/train-000001.tar") as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}
    assert set(read_manifest(tmp_path / "out/train").fields) == set(fields)


@pytest.mark.parametrize(("format", "quality"), [("png", None), ("jpg", 90), ("webp", 90)])
def test_other_formats(tmp_path: Path, format: str, quality: int | None) -> None:
    result = _pack(_images(tmp_path / "in", 3), tmp_path / "out", _options(encoding=Encoding(format, quality)))
    assert result.manifests["train"].transform["format"] == format
    for sample in stored_samples(tmp_path / "out/train").values():
        assert Image.open(io.BytesIO(sample[format])).size == (16, 16)
    with pytest.raises(InputError, match="quality=90 with format=png"):
        Encoding("png", 90)


def test_a_strangers_folder(tmp_path: Path) -> None:
    """Every mode is packed; what cannot be read is named, each with its reason."""
    folder = tmp_path / "in/some folder"
    folder.mkdir(parents=True)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
    for mode in ("P", "L", "1", "RGBA", "LA"):
        image.convert(mode).save(folder / f"mode.{mode}.png")
    image.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((40, 30), 40000, dtype=np.uint16)).save(folder / "deep.tiff")
    image.save(folder / "animated.gif", save_all=True, append_images=[image.rotate(90)])
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(folder / "turned.jpg", exif=exif)
    image.save(folder / "тыква.png")
    image.save(folder / "same.png")
    image.save(folder / "same.jpg")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("not an image")
    whole = (folder / "same.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(32))
    result = _pack(tmp_path / "in", tmp_path / "out", max_bad=0.5)
    bad = {Path(name).name: reason for name, reason in result.bad}
    assert set(bad) == {"empty.png", "text.jpg", "cut.png", "phone.heic"}
    assert bad["empty.png"] == "is empty"
    assert bad["text.jpg"] == bad["phone.heic"] == "is not an image"
    assert json.loads((tmp_path / "out/train/bad.json").read_text())[0]["name"] == "some folder/cut.png"
    samples = stored_samples(tmp_path / "out/train")
    assert len(samples) == 12
    assert all("." not in key and key.isascii() for key in samples)
    names = {json.loads(sample["json"])["file_name"]: key for key, sample in samples.items()}
    assert json.loads(samples[names["some folder/turned.jpg"]]["json"])["original_width"] == 30
    grey = Image.open(io.BytesIO(samples[names["some folder/deep.tiff"]]["webp"])).getpixel((3, 3))
    assert grey == (156, 156, 156)  # 40000 / 257


def test_too_many_bad_images_fail_and_a_higher_share_continues(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 20)
    for number in range(4):
        (source / f"{number:04d}.png").write_bytes(b"broken")
    (source / "0004.png").unlink()
    with pytest.raises(InputError, match=r"max-bad=0\.1: .* of 20 images cannot be used \(0000\.png is not an image"):
        _pack(source, tmp_path / "out")
    assert not list(tmp_path.rglob("manifest.json"))
    result = _pack(source, tmp_path / "out", max_bad=0.25)
    assert result.manifests["train"].total == 15
    assert result.bad[-1] == ("0004.png", "is missing")


def test_tars_to_shards(tmp_path: Path) -> None:
    _pack(_images(tmp_path / "in", 30), tmp_path / "first")
    options = _options(transform=Transform(8), split=SplitRule(0.2, stratify="kind"), class_field="kind", shard_size=10)
    result = _pack(tmp_path / "first/train", tmp_path / "second", options)
    assert (result.manifests["train"].total, result.manifests["val"].total) == (24, 6)
    fields = json.loads(
        stored_samples(tmp_path / "second/train")["0003"]["json"]
        if "0003" in stored_samples(tmp_path / "second/train")
        else stored_samples(tmp_path / "second/val")["0003"]["json"]
    )
    assert (fields["caption"], fields["class"], fields["class_id"]) == ("番号 3", "b", 1)


@pytest.mark.parametrize("stratified", [False, True])  # fields are read early, or with the image
def test_a_field_of_tars_becomes_the_caption(tmp_path: Path, stratified: bool) -> None:
    _pack(_images(tmp_path / "in", 6), tmp_path / "first")
    options = _options(split=SplitRule(0.5, stratify="kind")) if stratified else _options()
    for field, expected in {"kind": "b", "caption": "番号 3", "none": None}.items():
        pack(list_source(tmp_path / "first/train", caption=field), tmp_path / field, options, workers=1)
        found = {
            k: v
            for split in ("train", "val")
            if (tmp_path / field / split).exists()
            for k, v in stored_samples(tmp_path / field / split).items()
        }
        fields = json.loads(found["0003"]["json"])
        assert (fields.get("caption"), fields["kind"]) == (expected, "b")
    with pytest.raises(InputError, match=r"images cannot be used .*no nosuch for its caption"):
        pack(list_source(tmp_path / "first/train", caption="nosuch"), tmp_path / "none2", options, workers=1)
    with pytest.raises(InputError, match=r"other images or captions"):
        pack(list_source(tmp_path / "first/train"), tmp_path / "kind", options, workers=1)


@pytest.mark.parametrize(
    ("layout", "option"), [("tars", "file_column"), ("plain", "file_column"), ("plain", "caption")]
)
def test_a_column_of_what_is_no_table_is_refused(tmp_path: Path, layout: str, option: str) -> None:
    _pack(_images(tmp_path / "in", 3), tmp_path / "out")
    (tmp_path / "in" / "metadata.jsonl").unlink()
    source = tmp_path / ("out/train" if layout == "tars" else "in")
    with pytest.raises(InputError, match=r"--(file|caption)-field kind: .* no table"):
        list_source(source, **{option: "kind"})  # type: ignore[arg-type]


@pytest.mark.parametrize("words", [["--group", "kind"], ["--stratify", "kind"], ["--val-least", "2"], ["--seed", "3"]])
def test_choosing_what_is_held_out_where_nothing_is(words: list[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    pack_words = [str(_images(tmp_path / "in", 3)), str(tmp_path / "out"), *words]
    with pytest.raises(InputError, match=rf"^{' '.join(words)} .* give --val SHARE too"):
        command.run(parser.parse_args(pack_words))
    assert not (tmp_path / "out").exists()


def test_what_is_refused_before_or_after_reading_leaves_nothing(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 5)
    with pytest.raises(InputError, match="no image is left for the train split"):
        _pack(source, tmp_path / "out", _options(min_side=1000))
    with pytest.raises(InputError, match=r"max-bad=0\.1: 5 of 5 images .* no caption file .*--layout captions"):
        pack(list_source(source, layout="captions"), tmp_path / "out", _options(), workers=1)
    assert not (tmp_path / "out").exists()
    assert len(_pack(source, tmp_path / "out").manifests) == 1


def test_a_refused_pack_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    source, out = _images(tmp_path / "in", 5), tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match="no image is left"):
        _pack(source, out, _options(min_side=1000))
    assert list(out.iterdir()) == []

    def write(done: int, total: int) -> None:
        (out / "train" / "notes.txt").write_text("mine")

    with pytest.raises(InputError, match="no image is left"):
        _pack(source, out, _options(min_side=1000), progress=write)
    assert [path.name for path in (out / "train").iterdir()] == ["notes.txt"]


def test_small_images_are_left_out_on_request(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 5)
    Image.new("RGB", (100, 10)).save(source / "0002.png")
    result = _pack(source, tmp_path / "out", _options(min_side=24))
    assert (result.manifests["train"].total, result.small, result.bad) == (4, 1, [])


class _StopError(Exception):
    pass


def test_an_interrupted_pack_keeps_finished_shards(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 130)
    _pack(source, tmp_path / "straight")

    def stop(done: int, total: int) -> None:
        if done > 90:
            raise _StopError

    with pytest.raises(_StopError):
        _pack(source, tmp_path / "out", progress=stop)
    kept = sorted((tmp_path / "out").rglob("*.tar"))
    assert len(kept) == 2
    assert not list((tmp_path / "out").rglob("*.tmp"))
    with pytest.raises(InputError, match="interrupted"):
        read_manifest(tmp_path / "out/train")
    times = [path.stat().st_mtime_ns for path in kept]
    _pack(source, tmp_path / "out", workers=2)
    assert [path.stat().st_mtime_ns for path in kept] == times
    assert _tars(tmp_path / "out") == _tars(tmp_path / "straight")
    assert _pack(source, tmp_path / "out").complete_before
    next((tmp_path / "out" / "train").glob("*.tar")).unlink()
    with pytest.raises(InputError, match=r"was complete and is damaged: .* is missing"):
        _pack(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir() if path.suffix == ".json") == [
        "manifest.json",
        "plan.json",
    ]


@pytest.mark.slow
def test_a_killed_pack_goes_on_and_leaves_no_workers(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 160, side=96)
    arguments = ["pack", str(source), str(tmp_path / "out"), "--size", "96", "--shard-size", "32", "--workers", "2"]
    code = f"from ldmlab.app.cli import dispatch; dispatch({arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/train/*.tar")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    options = _options(transform=Transform(96), shard_size=32)
    _pack(source, tmp_path / "out", options)
    _pack(source, tmp_path / "straight", options)
    assert _tars(tmp_path / "out") == _tars(tmp_path / "straight")
    assert not [pid for pid in workers if Path(f"/proc/{pid}/stat").exists() and _state(pid) not in "ZX"]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_other_options_or_images_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 4)
    _pack(source, tmp_path / "out")
    with pytest.raises(InputError, match=r"transform\.size=16 \(now 8\)"):
        _pack(source, tmp_path / "out", _options(transform=Transform(8)))
    _images(tmp_path / "in", 5)
    with pytest.raises(InputError, match=r"other images or captions"):
        _pack(source, tmp_path / "out")
    result = _pack(source, tmp_path / "out", _options(split=SplitRule(name="test")))  # a further split is welcome
    assert list(result.manifests) == ["test"]


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    source = _images(tmp_path / "in", 4)
    with pytest.raises(InputError, match=r"holds something else \(0000\.png\)"):
        _pack(source, source)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        _pack(source, tmp_path / "file")
    (tmp_path / "out").mkdir()
    lock = FileLock(tmp_path / "out/.lock")
    assert lock.take()
    with pytest.raises(InputError, match="in use by another process"):
        _pack(source, tmp_path / "out")
    lock.release()
    _pack(source, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["train"]


def test_no_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _images(tmp_path / "in", 4)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("ldmlab.data.output_folder.os.fsync", full)
        with pytest.raises(InputError, match=r"no space left for .*out/train/.*; free some disk space"):
            _pack(source, tmp_path / "out")
    assert not list(tmp_path.rglob("*.tmp"))
    assert _pack(source, tmp_path / "out").manifests["train"].total == 4


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _images(tmp_path / "in", 6)
    (source / "0001.png").write_bytes(b"")
    words = [str(source), str(tmp_path / "out"), "--size", "16", "--val", "0.2", "--max-bad", "0.2", "--workers", "1"]
    command.run(_parser().parse_args(words))
    said = " ".join(capsys.readouterr().err.split())
    assert "0001.png: is empty" in said
    assert read_manifest(tmp_path / "out/train").source == "in"
    command.run(_parser().parse_args(words))
    assert "complete already" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="--workers 0 must be at least 1"):
        command.run(_parser().parse_args([*words[:2], "--workers", "0"]))


def test_packing_does_not_import_torch() -> None:
    code = "import sys, ldmlab.app.commands.pack, ldmlab.app.commands.shard_folders; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


_README = (ROOT / "data/README.md").read_text(encoding="utf-8").replace("\\\n", " ")
_COMMANDS = [line.strip() for line in re.findall(r"^\s*ldmlab (?:pack|index) .*$", _README, re.MULTILINE)]


def test_readme_has_commands_for_every_data_set() -> None:
    assert len(_COMMANDS) >= 12
    for name in ("CelebA-HQ", "FFHQ", "LSUN", "ImageNet", "LAION-400M", "MS-COCO", "OpenImages", "Places", "emoji"):
        assert name in _README


@pytest.mark.parametrize("line", [line for line in _COMMANDS if line.startswith("ldmlab pack")])
def test_readme_commands_parse(line: str) -> None:
    args = _parser().parse_args(shlex.split(line)[2:])
    options = command.options_of(args)
    assert options.transform(Image.new("RGB", (520, 400))).mode == "RGB"


def test_the_shipped_set_is_whole() -> None:
    """Checksums, the held-out share of every category, and no variant of an emoji on both sides."""
    groups = {}
    for split in ("train", "val"):
        folder = ROOT / "data/emoji-256" / split
        manifest = read_manifest(folder)
        check_shards(folder, manifest, sha256=True)
        rows = [json.loads(sample["json"]) for sample in stored_samples(folder).values()]
        assert len(rows) == manifest.total
        groups[split] = {re.sub("-1f3f[b-f]|-fe0f|^0+", "", row["codepoints"]) for row in rows}
        counts = [sum(row["class_id"] == number for row in rows) for number in range(9)]
        assert min(counts) >= 10
    assert not groups["train"] & groups["val"]
