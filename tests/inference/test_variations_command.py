"""Variations of images by a model that looks at them, on the command line and in Python."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldmlab.errors import InputError
from ldmlab.evaluation.task_part import request_image
from ldmlab.inference.grids import read_settings
from sampling_models import sample_command, tiny_model


def image(folder: Path, name: str, width: int, height: int) -> Path:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return image(tmp_path, "wide.png", 50, 30)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return image(tmp_path, "small.png", 20, 20)


def drawn(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))]


def sampled(out: Path, *words: str) -> list[np.ndarray]:
    sample_command(["runs/tiny", *words, "--steps", "2", "--out", str(out)], "reference")
    return drawn(out)


def test_several_of_images_of_any_size(tmp_path: Path, wide: Path, small: Path) -> None:
    made = sampled(tmp_path / "out", "--task", "variations", str(wide), str(small), "--count", "2")
    assert [p.shape for p in made] == [(16, 16, 3)] * 4  # as trained: an image looked at says nothing of the size
    told = read_settings(tmp_path / "out" / "000002.png")
    assert (told["reference"], told["guidance_scale"]) == (str(small), "3.0")
    assert all((made[i] != made[j]).any() for i in range(4) for j in range(i))
    plain = sampled(tmp_path / "plain", str(wide), str(small), "--count", "2", "--batch-size", "1")
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(made, plain, strict=True))
    larger = sampled(tmp_path / "larger", str(wide), "--size", "24x32")
    assert larger[0].shape == (24, 32, 3)


def test_a_start_is_looked_at_unless_another_is_named(tmp_path: Path, small: Path, wide: Path) -> None:
    start = ["--from", str(small), "--size", "16", "--strength", "0.5"]
    itself = sampled(tmp_path / "itself", *start)
    named = sampled(tmp_path / "named", *start, "--task", "variations", str(small))
    other = sampled(tmp_path / "other", *start, "--task", "variations", str(wide))
    assert np.array_equal(itself[0], named[0])
    assert (itself[0] != other[0]).any()


def test_holes_are_filled_with_what_a_image_shows(tmp_path: Path, wide: Path) -> None:
    photo = image(tmp_path, "photo.png", 16, 16)
    Image.fromarray(np.repeat([[0] * 8 + [255] * 8], 16, 0).astype(np.uint8)).save(tmp_path / "hole.png")
    hole = ["--from", str(photo), "--mask", str(tmp_path / "hole.png"), "--repeats", "2"]
    (made,) = sampled(tmp_path / "out", "--task", "variations", str(wide), *hole)
    known = np.asarray(Image.open(photo))
    assert np.array_equal(made[:, :8], known[:, :8])
    assert (made[:, 8:] != known[:, 8:]).any()


def test_fields_and_python(tmp_path: Path, small: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps({"reference": str(small)}) + "\n")
    (made,) = sampled(tmp_path / "out", "--prompts", str(file))
    model = tiny_model("reference")
    assert model.reads == {"reference"}
    images = model.sample(reference=[np.asarray(Image.open(small))], steps=2)
    assert torch.equal(images[0], torch.from_numpy(made.copy()))


def test_a_report_shows_what_was_looked_at(wide: Path) -> None:
    shown = request_image({"reference": np.asarray(Image.open(wide))}, 12)
    assert shown is not None
    assert shown.shape == (3, 12, 12)


@pytest.mark.parametrize(
    ("words", "told", "message"),
    [
        (
            ["--task", "variations", "SMALL"],
            "class_id",
            "takes class_id as input, not reference; give one trained with conditi",
        ),
        (["--task", "variations"], "reference", "--task variations needs files to work on"),
        (["--task", "variations", "nowhere.png"], "reference", r"reference=nowhere.png cannot be read as an image"),
        ([], "reference", "this model takes reference as input; give at least one prompt"),
        (["--task", "variations", "SMALL", "--repeats", "2"], "reference", "--repeats 2 is for holes"),
        (["--task", "variations", "SMALL", "--strength", "0.3"], "reference", "--strength 0.3 needs an image"),
    ],
)
def test_refusals_leave_no_folder(tmp_path: Path, small: Path, words: list[str], told: str, message: str) -> None:
    given = [str(small) if word == "SMALL" else word for word in words]
    with pytest.raises(InputError, match=message):
        sample_command(["runs/tiny", *given, "--out", str(tmp_path / "out")], told)
    assert not (tmp_path / "out").exists()
