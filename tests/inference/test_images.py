"""Sheets, strips and PNG files."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from ldmlab.data.image_sources import list_source
from ldmlab.errors import InputError
from ldmlab.inference import grids
from ldmlab.inference.grids import LabelFont, grid, read_settings, save_animation, save_png, table, wrap
from ldmlab.inference.model import generate
from ldmlab.inference.sample_settings import SampleSettings
from ldmlab.inference.trajectory import Trajectory
from sampling_models import tiny_model

CAPTIONS = ["a red apple", "猫と犬がいる", "قطة حمراء", "🙂🙃 emoji", "", "line\nbreak", "w" * 400, "a " * 200]


def plain(colour: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def test_settings_travel_in_the_png(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    settings = {"prompt": "猫 🙂 “quoted”\nsecond line", "seed": 3, "eta": 0.5, "size": "32x48"}
    save_png(tmp_path / "a.png", image, settings)
    assert read_settings(tmp_path / "a.png") == {key: str(value) for key, value in settings.items()}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)


def test_grid_holds_every_image_in_order() -> None:
    sheet = np.asarray(grid([plain(20 * i) for i in range(7)], CAPTIONS[:7], columns=3))
    cell = 128  # 32 px enlarged four times
    rows = {y for y in range(sheet.shape[0]) if (sheet[y, 8] == 0).all()}
    assert len(rows) == cell  # the first image's height; the others of its column are grey
    top = min(rows)
    for i in range(3):
        assert (sheet[top + 5, 8 + i * (cell + 8) + 5] == 20 * i).all()
    assert grid([plain(0)]).size == (8 + cell + 8, 8 + cell + 8)


@pytest.mark.parametrize("shape", [(16, 16), (64, 96), (512, 384)])
def test_captions_of_any_language_and_length(shape: tuple[int, int]) -> None:
    sheet = grid([plain(128, *shape) for _ in CAPTIONS], CAPTIONS)
    assert min(sheet.size) > min(shape)
    assert table([[plain(0, *shape)] * 2] * 2, ["steps 1", "steps 2"], CAPTIONS[:2]).size[0] > shape[1]


def test_labels_stay_within_their_image() -> None:
    font = ImageFont.load_default(13)
    for caption in CAPTIONS:
        lines = wrap(caption, 128, font)
        assert 1 <= len(lines) <= 2
        assert all(font.getlength(line) <= 128 for line in lines)
    assert wrap("a red apple", 128, font) == ["a red apple"]
    assert wrap("w" * 400, 128, font)[0].endswith("...")


def test_no_images_no_grid() -> None:
    with pytest.raises(InputError, match="at least one image"):
        grid([])


@pytest.mark.parametrize("ending", [".webp", ".gif"])
def test_animation(tmp_path: Path, ending: str) -> None:
    save_animation(tmp_path / f"a{ending}", [plain(40 * i) for i in range(5)])
    with Image.open(tmp_path / f"a{ending}") as animation:
        assert animation.n_frames == 5
        assert animation.size == (128, 128)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "frames"), [(1, 2), (5, 6), (100, 49)])
def test_strip_goes_from_noise_to_the_image(steps: int, frames: int) -> None:
    model, settings = tiny_model(), SampleSettings(steps=steps, seed=2)
    strip = Trajectory(model, model.resolved(settings))
    [(numbers, images)] = generate(model, [{"class_id": 1}, {"class_id": 2}], settings, after_step=strip)
    rows = strip.take([{"class_id": 1}, {"class_id": 2}], numbers)
    assert [len(row) for row in rows] == [frames] * 2
    for row, image in zip(rows, images.numpy(), strict=True):
        assert int(np.abs(row[-1].astype(int) - image).max()) <= 1
    start = model.decode(model.diffusion.start(torch.tensor([0, 1]), (16, 16), 2))
    assert np.array_equal(rows[1][0], start[1].numpy())
    assert strip.titles()[0] == "noise"
    assert strip.titles()[-1] == f"step {steps}"
    assert strip.columns()[0] == 0
    assert strip.columns()[-1] == frames - 1
    assert len(strip.columns()) == min(frames, 10)


def test_a_caption_of_any_script_is_drawn_or_said_to_be_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LabelFont(["red apple"], 13)
    assert plain.label("red apple") == "red apple"
    monkeypatch.setattr(grids, "_matching", lambda letters: None)  # a machine without fonts
    poor = LabelFont(["red apple", "红苹果"], 13)
    assert poor.label("red apple") == "red apple"
    assert poor.label("红苹果") == grids.UNDRAWABLE


@pytest.mark.skipif(shutil.which("fc-match") is None, reason="fontconfig is not installed")
def test_the_machines_fonts_are_asked_where_ours_lacks_a_letter() -> None:
    word = "синий квадрат"
    machine = LabelFont([word], 13)
    if grids._matching(frozenset(word) - {" "}) is not None:
        assert machine.label(word) == word


def test_grids_beside_samples_are_no_images_to_pack_and_are_counted(tmp_path: Path) -> None:
    for name in ("000000.png", "000001.png", "grid.png", "000001_trajectory.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    source = list_source(tmp_path)
    assert [item.name for item in source.items] == ["000000.png", "000001.png"]
    assert source.notes == ("2 grids and trajectories beside samples of `ldmlab sample` are left out",)
    (tmp_path / "000000.png").unlink()  # names of one's own
    assert [item.name for item in list_source(tmp_path).items] == ["000001.png", "000001_trajectory.png", "grid.png"]
