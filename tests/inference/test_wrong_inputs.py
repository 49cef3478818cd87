"""Settings and inputs of wrong kinds end in one sentence that names the option, before a folder is made."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmlab.app.cli import Parser
from ldmlab.app.commands import sample
from ldmlab.diffusion.paths import EdmPath
from ldmlab.disks import FileLock
from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings
from ldmlab.inference.sample_settings import SampleSettings, parsed
from sampling_models import sample_command, tiny_model

NUMBERS = ["nan", "inf", "-inf", "abc", "", "1e400", "--1", "0x10", "1,5", "٣٫٥"]
WHOLE = [*NUMBERS, "2.5", "1e3", "4.0"]


def refused(folder: Path, words: list[str], told: str | None = "class_id") -> str:
    """The sentence; nothing was written."""
    out = folder / "out"
    with pytest.raises(InputError) as caught:
        sample_command(["runs/tiny", *words, "--out", str(out)], told)
    assert not out.exists()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 1000
    return text


@pytest.mark.parametrize("option", ["steps", "seed", "repeats", "tile", "window"])
@pytest.mark.parametrize("value", [*WHOLE, "-1"])
def test_whole_numbers(tmp_path: Path, option: str, value: str) -> None:
    assert f"--{option} {value}" in refused(tmp_path, ["1", f"--{option}={value}"])


@pytest.mark.parametrize("option", ["guidance-scale", "eta", "strength"])
@pytest.mark.parametrize("value", NUMBERS)
def test_finite_numbers(tmp_path: Path, option: str, value: str) -> None:
    words = ["1", f"--{option}={value}", *(["--from", "x.png"] if option == "strength" else [])]
    assert f"--{option} {value}" in refused(tmp_path, words)


@pytest.mark.parametrize(
    "words",
    [
        ["--strength=1.5", "--from", "x.png"],
        ["--strength=-0.1", "--from", "x.png"],
        ["--eta=-0.5"],
        ["--steps=0"],
        ["--steps=1001"],
        ["--steps=99999999999999999999"],
        [f"--seed={2**64}"],
        ["--size=0"],
        ["--size=0x16"],
        ["--size=16x"],
        ["--size=-16"],
        ["--size=16.0"],
        ["--size=16x16x16"],
        ["--size=٣٢"],
        ["--size=1000000x1000000"],
        ["--tile=3"],
        ["--window=5"],
        ["--spacing=even"],
        ["--sampler=dpm"],
        ["--tile-norms=mixed"],
        ["--precision=fp8"],
        ["--count=0"],
        ["--count=100000000"],
        ["--batch-size=0"],
        ["--first-index=-1"],
        [f"--first-index={2**63}"],
        ["--sweep=steps"],
        ["--sweep=steps="],
        ["--sweep=model=1,2"],
        ["--sweep=guidance_scale=1,nan"],
    ],
)
def test_values_outside(tmp_path: Path, words: list[str]) -> None:
    option = words[0].partition("=")[0]
    named = "--guidance-scale" if "nan" in words[0] else option
    assert named in refused(tmp_path, ["1", *words])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (2.5, True, "5", float("nan"), [5], np.float32(1.5))),
        *(("guidance_scale", value) for value in (float("inf"), "3", [1.0], False)),
        *(("seed", value) for value in (None, 1.5, -1, 2**64)),
        *(("size", value) for value in ((16,), (16, 16, 16), (16, "16"), 0, (16.5, 16), "16")),
        *(("sampler", value) for value in (None, 3)),
        ("eta", "none"),
        ("tile_norms", None),
    ],
)
def test_python_values(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}="):
        tiny_model().sample(class_id=[1], **{name: value})


def test_whole_numbers_of_any_type_are_taken() -> None:
    settings = SampleSettings(steps=np.int64(5), seed=torch.tensor(7), guidance_scale=np.float32(1.5), size=[16, 24])  # type: ignore[arg-type]
    assert (settings.steps, settings.seed, settings.guidance_scale, settings.size) == (5, 7, 1.5, (16, 24))
    assert parsed("size", "16X24") == (16, 24)


@pytest.mark.parametrize("value", [1.5, "3", True, None, float("nan"), -1, 2**63, [1], {"class": 1}])
def test_class_numbers(value: Any) -> None:
    with pytest.raises(InputError, match="class_id="):
        tiny_model().sample(class_id=[value], steps=1)


@pytest.mark.parametrize("value", [None, 7, 1.5, float("nan"), ["a cat"], {"text": "a cat"}, b"a cat", "half \ud83d"])
@pytest.mark.parametrize("field", ["caption", "negative_prompt"])
def test_captions(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{field}="):
        tiny_model("caption").sample(**{"caption": ["a"], field: [value]}, steps=1)


@pytest.mark.parametrize("columns", [{"class_id": 3}, {"caption": "a cat"}, {"class_id": [1, 2], "count": 3}])
def test_columns_are_lists_of_one_length(columns: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        tiny_model("caption" if "caption" in columns else "class_id").sample(**columns, steps=1)


@pytest.mark.parametrize(
    "line",
    [
        '{"caption": null}',
        '{"caption": NaN}',
        '{"caption": ["a", "b"]}',
        '{"caption": "\\ud83d"}',
        '{"captions": "a cat"}',
        '{"caption": "a", "negative": "b"}',
        '"a cat"',
        "7",
        "[" * 100_000,
        '{"caption": "a"',
    ],
)
def test_lines_of_a_json_file(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n")
    refused(tmp_path, ["--prompts", str(file)], "caption")


def test_fields_that_are_not_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"class_id": 3, "note": "x", "width": 640}\n')
    sample_command(["runs/tiny", "--prompts", str(file), "--steps", "1", "--out", str(tmp_path / "out")])
    assert "not read by this model: note, width" in capsys.readouterr().out


def spoiled_images(folder: Path) -> dict[str, Path]:
    """Files that are no images of an allowed format, by what is wrong with them."""
    found = {name: folder / f"{name}.png" for name in ("empty", "text", "torn", "postscript", "tga", "folder", "fifo")}
    found["empty"].touch()
    found["text"].write_text("no image")
    Image.new("RGB", (64, 64)).save(found["torn"])
    found["torn"].write_bytes(found["torn"].read_bytes()[:-40])
    found["postscript"].write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n%%EOF\n")
    Image.new("RGB", (16, 16)).save(found["tga"], format="TGA")
    found["folder"].mkdir()
    os.mkfifo(found["fifo"])
    return found | {"missing": folder / "missing.png", "long": folder / ("x" * 300)}


@pytest.mark.parametrize("kind", ["empty", "text", "torn", "postscript", "tga", "folder", "fifo", "missing", "long"])
@pytest.mark.parametrize("option", ["--from", "--mask"])
def test_images_that_cannot_be_opened(tmp_path: Path, kind: str, option: str) -> None:
    path = spoiled_images(tmp_path)[kind]
    Image.new("RGB", (16, 16)).save(tmp_path / "good.png")
    words = ["--from", str(tmp_path / "good.png"), "--mask", str(path)] if option == "--mask" else ["--from", str(path)]
    assert str(path) in refused(tmp_path, ["1", *words, "--steps", "2"])


@pytest.mark.parametrize("value", [5, None, {"a": 1}, "", [1, 2], np.zeros((4, 4)), np.zeros((4, 4, 3))])
def test_images_that_are_none(value: Any) -> None:
    with pytest.raises(InputError, match="init_image"):
        tiny_model().sample(class_id=[1], init_image=[value], steps=2)


def test_prompts_from_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary.txt").write_bytes(bytes(range(128, 256)))
    for name in ("pipe", "folder", "binary.txt", "x" * 300, "missing.txt"):
        assert f"--prompts {tmp_path / name}" in refused(tmp_path, ["--prompts", str(tmp_path / name)])


@pytest.mark.parametrize("place", ["file", "file/below", "full"])
def test_folders_that_cannot_be_used(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000000.png").touch()
    with pytest.raises(InputError, match="--out"):
        sample_command(["runs/tiny", "1", "--steps", "1", "--out", str(tmp_path / place)])
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["000000.png"]


def test_a_folder_belongs_to_one_command_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    lock = FileLock(tmp_path / "out" / ".sampling")
    assert lock.take()
    with pytest.raises(InputError, match="in use"):
        sample_command(["runs/tiny", "1", "--steps", "1", "--out", str(tmp_path / "out")])
    lock.release(remove=True)
    sample_command(["runs/tiny", "1", "--steps", "1", "--out", str(tmp_path / "out")])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000000.png", "grid.png"]


def test_a_shift_without_effect_is_refused() -> None:
    """Steps even in sigma / alpha are the same with any shift, and EDM's path has such by default."""
    model = tiny_model()
    model.diffusion.schedule = model.diffusion.path = EdmPath()
    with pytest.raises(InputError, match=r"shift=3\.0 has no effect on spacing=karras, .* add spacing=linspace"):
        model.resolved(SampleSettings(shift=3.0))
    plain, shifted = (model.grid(model.resolved(SampleSettings(shift=s, spacing="linspace"))) for s in (None, 3.0))
    assert shifted[5].sigma > 1.5 * plain[5].sigma


def test_every_setting_is_an_option() -> None:
    parser = Parser()
    sample.add_arguments(parser)
    options = {action.dest for action in parser._actions}
    assert SampleSettings.__dataclass_fields__.keys() <= options


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sampler", "plms", "--temperature", "0.5"], "--temperature 0.5: the sampler plms has no such setting"),
        (["--temperature", "-1"], "--temperature -1"),
        (["--quantize-x0"], "--quantize-x0 true"),  # the tiny model's first stage has no codebook
        (["--quantize-x0", "maybe"], "--quantize-x0 maybe is not true or false"),
    ],
)
def test_options_of_samplers(tmp_path: Path, words: list[str], message: str) -> None:
    assert message in refused(tmp_path, ["1", "--steps", "2", *words])


def test_options_of_samplers_are_recorded(tmp_path: Path) -> None:
    words = ["runs/tiny", "1", "--steps", "2", "--eta", "1", "--spacing", "quad", "--temperature", "0.5"]
    sample_command([*words, "--out", str(tmp_path / "cool")])
    sample_command([*words[:-2], "--temperature", "1", "--out", str(tmp_path / "usual")])
    told = read_settings(tmp_path / "cool" / "000000.png")
    assert (told["temperature"], told["spacing"]) == ("0.5", "quad")
    assert (tmp_path / "cool" / "000000.png").read_bytes() != (tmp_path / "usual" / "000000.png").read_bytes()
