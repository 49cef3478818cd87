"""`ldmlab sample` from words to files."""

import argparse
import errno
import json
import multiprocessing
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmlab.app.commands.sample_prompts import prompt_lines
from ldmlab.app.sample_files import check_folder
from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings, save_png
from ldmlab.marking.credentials import credentials
from ldmlab.marking.watermark import THRESHOLD, watermark_score
from sampling_models import sample_as_rank, sample_command


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_grid_and_settings(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["runs/tiny", "--steps", "5", "4", "7", "--count", "2", "--size", "12x16", "--seed", "9", "--out", str(out)]
    sample_command(words)
    assert names(out) == ["000000.png", "000001.png", "000002.png", "000003.png", "grid.png"]
    told = read_settings(out / "000002.png")
    expected = {
        "class_id": "7", "index": "2", "seed": "9", "steps": "5", "guidance_scale": "3.0", "eta": "0.0",
        "sampler": "ddim", "spacing": "official", "size": "12x16", "precision": "float32", "model path": "runs/tiny",
        "model fingerprint": "0123456789abcdef", "model weights": "averaged", "model step": "7",
    }  # fmt: skip
    assert expected.items() <= told.items()
    assert "ldmlab" in told
    assert Image.open(out / "000002.png").size == (16, 12)


def test_captions_from_a_file_in_any_language(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    long = "a very long caption of a cat " * 3
    file.write_text(f"\ufeffa red apple\n\n  猫と犬  \n{long}\n", encoding="utf-8")
    out = tmp_path / "out"
    sample_command(["runs/tiny", "قطة", "--prompts", str(file), "--steps", "2", "--out", str(out)], "caption")
    told = [read_settings(out / f"{i:06d}.png")["prompt"] for i in range(4)]
    assert told == ["قطة", "a red apple", "猫と犬", long.strip()]
    assert "too long for this model, which does not see" in capsys.readouterr().out


def test_fields_from_a_json_lines_file(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"class_id": 3, "note": "ignored"}\n{"class_id": 4}\n')
    sample_command(["runs/tiny", "--prompts", str(file), "--steps", "2", "--out", str(tmp_path / "out")])
    assert read_settings(tmp_path / "out" / "000001.png")["class_id"] == "4"


def test_strip(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sample_command(["runs/tiny", "1", "2", "--steps", "5", "--trajectory", "--batch-size", "1", "--out", str(out)])
    expected = [f"00000{i}{end}" for i in (0, 1) for end in (".png", "_trajectory.png", "_trajectory.webp")]
    assert names(out) == [*expected, "grid.png"]
    with Image.open(out / "000001_trajectory.webp") as animation:
        assert animation.n_frames == 6


@pytest.mark.parametrize("sweep", ["steps=1,2,5", "guidance_scale=1,3", "eta=0,0.5,1", "sampler=ddim,ddpm"])
def test_sweep(tmp_path: Path, sweep: str) -> None:
    out = tmp_path / "out"
    sample_command(["runs/tiny", "1", "2", "--steps", "2", "--sweep", sweep, "--out", str(out)])
    name, values = sweep.split("=")[0], sweep.split("=")[1].split(",")
    assert f"sweep_{name}.png" in names(out)
    images = sorted(out.glob("00*.png"))
    assert len(images) == 2 * len(values)
    assert {read_settings(path)[name] for path in images} == {
        value if name == "sampler" else str(type(1 if name == "steps" else 1.0)(value)) for value in values
    }


@pytest.mark.slow
def test_a_model_without_conditions(tmp_path: Path) -> None:
    sample_command(["runs/tiny", "--count", "3", "--steps", "2", "--out", str(tmp_path / "out")], None)
    assert len(names(tmp_path / "out")) == 4
    with pytest.raises(InputError, match="takes no prompts"):
        sample_command(["runs/tiny", "a cat"], None)


def test_default_folders_never_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        sample_command(["runs/tiny", "1", "--steps", "1"])
    assert names(tmp_path / "outputs") == ["tiny-1", "tiny-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give at least one prompt"),
        (["cat"], "cat: this model takes class numbers"),
        (["1", "--size", "15x16"], r"--size 15x16 \(height x width\) is not a multiple of 2.*nearest is 16x16"),
        (["1", "--size", "big"], "--size big is not a size"),
        (["1", "--steps", "9"], r"--steps 9: .*--steps 8 or 10"),
        (["1", "--sweep", "steps=1,400"], "steps 400"),
        (["1", "--sweep", "stepz=1"], "--sweep stepz=1 is not a sweep"),
        (["1", "--sweep", "steps=1,a"], "--steps a is not a whole number"),
        (["1", "--sweep", "steps=1,2", "--trajectory"], "one at a time"),
        (["1", "--count", "0"], "--count"),
        (["1", "--guidance-scale", "x"], "--guidance-scale"),
        (["1", "--precision", "int8"], "--precision int8 is unknown"),
        (["1", "--compile", "yes"], "--compile yes is unknown; choose auto, true or false"),
        (["1", "--prompts", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["1", "--out", "."], "holds files already"),
        (["1", "--mark", ""], "--mark= is unknown; choose one of watermark, credentials"),
    ],
)
def test_bad_input_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        sample_command(["runs/tiny", *words])
    assert names(tmp_path) == ["something"]


def test_bad_prompt_files(tmp_path: Path) -> None:
    for name, content, message in (
        ("empty.txt", b"\n\n", "holds no prompt"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "cannot be read as UTF-8"),
        ("a.jsonl", b"{", "line 1, is not JSON"),
        ("b.jsonl", b"[1]", "line 1, is not an object"),
        ("c.jsonl", json.dumps({"caption": "a"}).encode(), "also reads class_id"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=message):
            sample_command(["runs/tiny", "--prompts", str(tmp_path / name), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1e", "\x85"])
def test_a_line_of_prompts_ends_with_its_newline_only(tmp_path: Path, separator: str) -> None:
    prompt = f"a red{separator}apple"
    (tmp_path / "a.txt").write_text(f"{prompt}\r\nb\n", encoding="utf-8", newline="")
    rows = [{"caption": prompt}, {"caption": "b"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    for name, expected in (("a.txt", [prompt, "b"]), ("a.jsonl", rows)):
        assert prompt_lines(argparse.Namespace(file=tmp_path / name, words=[])) == expected


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_processes_make_the_same_images(tmp_path: Path, launcher: str) -> None:
    words = ["runs/tiny", *map(str, range(5)), "--steps", "2", "--eta", "1", "--batch-size", "2", "--out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # torch is loaded already
    both = [
        context.Process(target=sample_as_rank, args=(launcher, r, 2, port, [*words, str(tmp_path / "two")]))
        for r in (0, 1)
    ]
    for process in both:
        process.start()
    sample_command([*words, str(tmp_path / "one")])
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert names(tmp_path / "one") == names(tmp_path / "two")
    for name in names(tmp_path / "one"):
        one, two = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "two"))
        assert np.abs(one - two).max() <= 1


def test_help_imports_no_torch() -> None:
    code = (
        "import argparse, sys; from ldmlab.app.commands import sample; p = argparse.ArgumentParser();"
        "sample.add_arguments(p); p.format_help(); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_lock_of_a_killed_command_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".sampling").write_text("{}")
    check_folder(tmp_path / "out", "")
    (tmp_path / "out" / "000000.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds files already \(000000.png\)"):
        check_folder(tmp_path / "out", "")


def test_an_interrupted_command_may_be_run_again_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["runs/tiny", "1", "2", "3", "--steps", "2", "--out"]
    sample_command([*words, str(tmp_path / "whole")])
    again = [*words, str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr("ldmlab.app.sample_files.save_png", _no_space_after_one)
        with pytest.raises(OSError, match="No space"):
            sample_command(again)
    assert (tmp_path / "out" / "000000.png").exists()
    with pytest.raises(InputError, match="holds files already"):
        sample_command([*again, "--seed", "3"])
    sample_command([*again, "--batch-size", "2"])
    assert names(tmp_path / "out") == names(tmp_path / "whole")
    for name in names(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def _no_space_after_one(path: Path, *image: Any) -> None:
    if path.name != "000000.png":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    save_png(path, *image)


def test_marks_are_put_and_without_them_every_bit_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "weights"))
    words = ["runs/tiny", "1", "--steps", "2", "--size", "64x64", "--out"]
    for name, more in (("plain", []), ("marked", ["--mark", "watermark,credentials"]), ("again", [])):
        sample_command([*words, str(tmp_path / name), *more])
    plain, marked, again = ((tmp_path / name / "000000.png") for name in ("plain", "marked", "again"))
    assert plain.read_bytes() == again.read_bytes()
    assert watermark_score(np.asarray(Image.open(marked))) > THRESHOLD
    assert credentials(marked.read_bytes()).state == "valid"
    assert read_settings(plain) == read_settings(marked)
    assert (tmp_path / "plain" / "grid.png").read_bytes() == (tmp_path / "again" / "grid.png").read_bytes()
    assert credentials((tmp_path / "marked" / "grid.png").read_bytes()).state == "valid"
    with pytest.raises(InputError, match="cannot mark the animations"):
        sample_command([*words, str(tmp_path / "x"), "--mark", "watermark", "--trajectory"])
    with pytest.raises(InputError, match="16x16 px holds no readable watermark"):
        sample_command(
            ["runs/tiny", "1", "--steps", "2", "--size", "16x16", "--mark", "watermark", "--out", str(tmp_path / "y")]
        )
    with pytest.raises(InputError, match="--mark=stamp is unknown"):
        sample_command([*words, str(tmp_path / "x"), "--mark", "stamp"])
    with pytest.raises(InputError, match="do nothing without --mark credentials"):
        sample_command([*words, str(tmp_path / "x"), "--key", "k.pem"])
