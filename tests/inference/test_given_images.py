"""Sampling from an image and around a hole, with models that were trained for neither."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmlab.contracts import Level
from ldmlab.diffusion.given_image import GivenImage, hole_of_latents, painted_over
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SAMPLERS, SampleSettings, sampler_by_name
from sampling_models import sample_command, tiny_model

ODD = (13, 11)  # height and width that f = 2 does not divide


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model()


def image(height: int = 16, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def hole(height: int = 16, width: int = 16) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[3:9, 4:8] = True
    return mask


def distance(first: Any, second: Any) -> float:
    return float(np.abs(np.asarray(first).astype(float) - np.asarray(second)).mean())


# ---- image to image


def test_less_strength_stays_nearer(model: LoadedModel) -> None:
    source = image()
    seen = model.decode(model.encode(torch.from_numpy(source)[None]))[0]
    made = {
        strength: model.sample(class_id=[1], init_image=[source], strength=strength, steps=50, guidance_scale=1)[0]
        for strength in (0.02, 0.5, 1.0)
    }
    distances = [distance(made[strength], seen) for strength in (0.02, 0.5, 1.0)]
    assert distances[0] < 10 < distances[1] < distances[2]


def test_strength_is_the_same_noise_for_any_spacing(model: LoadedModel) -> None:
    for spacing in ("official", "linspace", "trailing", "karras", "log_snr"):
        settings = SampleSettings(steps=100, strength=0.4, spacing=spacing)
        grid = model.grid(model.resolved(settings))
        assert grid[0].time == pytest.approx(399.6, abs=12)
    ten = model.grid(model.resolved(SampleSettings(steps=10, strength=0.6)))
    assert [level.time for level in ten] == [501, 401, 301, 201, 101, 1, None]


def test_variations_differ_and_do_not_depend_on_company(model: LoadedModel) -> None:
    options: dict[str, Any] = {"strength": 0.5, "steps": 4, "sampler": "euler_ancestral"}
    both = model.sample(class_id=[1, 1], init_image=[image()] * 2, **options)
    one = model.sample(class_id=[1], init_image=[image()], **options)
    assert distance(both[0], both[1]) > 1
    assert torch.equal(both[0], one[0])


def test_strength_unsaid_is_written_down(model: LoadedModel) -> None:
    assert model.resolved(SampleSettings(), [{"class_id": 1, "init_image": image()}]).strength == 0.6
    assert "strength" not in model.resolved(SampleSettings(), [{"class_id": 1}]).as_text()


# ---- holes


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize(
    "sampler",  # not those for flows, nor those whose steps cannot be changed
    [name for name in SAMPLERS if name != "sde" and getattr(sampler_by_name(name), "shows_steps", True)],
)
def test_known_latents_are_put_back_at_every_level(sampler: str, repeats: int) -> None:
    noise, known = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    anew = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    anew[:, :, 1:3, :2] = True
    grid = [Level(a, (1 - a * a) ** 0.5, float(10 - i)) for i, a in enumerate((0.1, 0.5, 0.9))] + [Level(1, 0, None)]
    shown: list[int] = []

    def look(step: int, x: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        level = grid[step + 1]
        torch.testing.assert_close(x[kept], (level.alpha * known + level.sigma * noise)[kept])
        shown.append(step)
        return x

    kept = ~anew.expand_as(known)
    given = GivenImage(known=known, hole=anew, repeats=repeats)
    walk = given.around(sampler_by_name(sampler).along(Schedule()), fresh=lambda number: torch.randn_like(noise))
    end = walk(lambda x, level: x * 0.3, noise, grid, noise=lambda step: noise, after_step=look)
    assert shown == [0, 1, 2]
    assert torch.equal(end[kept], known[kept])
    assert not torch.allclose(end[~kept], known[~kept], atol=0.1)


def test_repeated_steps_make_the_hole_fit_what_is_known() -> None:
    """Of two pixels with correlation 0.9 one is known; repeats bring the regression of the other on it towards 0.9."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    noise = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    known = torch.randn(4000, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    grid = [Level(float(a), float((1 - a * a) ** 0.5), float(k)) for k, a in enumerate(torch.linspace(0.05, 0.999, 20))]
    grid.append(Level(1, 0, None))

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        spread = level.alpha**2 * covariance + level.sigma**2 * torch.eye(2)
        return level.alpha * x @ torch.linalg.solve(spread, covariance)

    slopes = []
    for repeats in (1, 10):
        given = GivenImage(known=known, hole=torch.tensor([True, False]).expand(4000, 1, 1, 2), repeats=repeats)
        generator = torch.Generator().manual_seed(2)
        walk = given.around(sampler_by_name("ddim"), lambda _, g=generator: torch.randn(noise.shape, generator=g))
        made, told = walk(denoise, noise, grid, noise=lambda step: noise)[..., 0, :].flatten(0, 1).T
        slopes.append(float((made * told).mean() / told.square().mean()))
    assert slopes[0] < 0.7
    assert 0.78 < slopes[1] < 0.92


@pytest.mark.parametrize("size", [(16, 16), ODD])
@pytest.mark.parametrize("told", ["class_id", None])
def test_the_rest_of_a_image_stays_bit_for_bit(told: str | None, size: tuple[int, int]) -> None:
    source, mask = image(*size), hole(*size)
    fields = {} if told is None else {"class_id": [3]}
    made = tiny_model(told).sample(image=[source], mask=[mask], steps=2, **fields)[0].numpy()
    assert made.shape == (*size, 3)
    assert np.array_equal(made[~mask], source[~mask])
    assert distance(made[mask], source[mask]) > 10


def test_what_is_removed_leaves_no_trace(model: LoadedModel) -> None:
    first, mask = image(), hole()
    second = first.copy()
    second[mask] = 255 - second[mask]
    made = [model.sample(class_id=[1], image=[p], mask=[mask], steps=4) for p in (first, second)]
    assert torch.equal(*made)
    assert not torch.equal(made[0], model.sample(class_id=[2], image=[first], mask=[mask], steps=4))


@pytest.mark.slow
def test_a_hole_can_start_from_the_image(model: LoadedModel) -> None:
    first, mask = image(), hole()
    fields: dict[str, Any] = {"class_id": [1], "image": [first], "mask": [mask], "steps": 50, "guidance_scale": 1}
    seen = model.decode(model.encode(torch.from_numpy(first)[None]))[0].numpy()
    near = model.sample(**fields, init_image=[first], strength=0.02)[0].numpy()
    far = model.sample(**fields)[0].numpy()
    assert np.array_equal(near[~mask], first[~mask])
    assert distance(near[mask], seen[mask]) < 0.5 * distance(far[mask], seen[mask])


def test_holes_are_painted_from_around() -> None:
    ramp = torch.linspace(-1, 1, 32).expand(1, 3, 24, 32).contiguous()
    mask = torch.zeros(1, 1, 24, 32, dtype=torch.uint8)
    mask[..., 8:16, 10:20] = 1
    full = mask.bool().expand_as(ramp)
    damaged = ramp.masked_fill(full, 7.0)
    painted = painted_over(damaged, mask)
    assert torch.equal(painted[~full], ramp[~full])
    assert (painted - ramp).abs().max() < 0.2
    assert painted_over(torch.full_like(ramp, 0.25), mask).sub(0.25).abs().max() < 1e-6
    assert torch.equal(painted_over(damaged, torch.ones_like(mask)), torch.zeros_like(ramp))  # nothing is known


def test_a_latent_that_a_hole_touches_is_made_anew() -> None:
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 3, 4] = 1
    assert hole_of_latents(mask, 4)[0, 0].tolist() == [[False, True], [False, False]]


# ---- sizes


def test_a_small_image_of_any_size_and_a_start_of_any_size(model: LoadedModel) -> None:
    made = model.sample(class_id=[1], init_image=[image(*ODD)], strength=0.5, steps=4)
    assert made.shape == (1, *ODD, 3)
    with pytest.raises(InputError, match=r"size=13x11 .* is not a multiple of 2"):
        model.sample(class_id=[1], size=ODD, steps=2)
    with pytest.raises(InputError, match="image for 16x16, mask for 13x11"):
        model.sample(class_id=[1], image=[image()], mask=[hole(*ODD)])


# ---- captions


def test_a_negative_caption_stands_for_the_empty_one() -> None:
    model = tiny_model("caption")

    def sample(**options: Any) -> torch.Tensor:
        return model.sample(caption=["a red apple"], steps=4, **{"guidance_scale": 3, **options})

    assert torch.equal(sample(negative_prompt=[""]), sample())
    assert not torch.equal(sample(negative_prompt=["a cat"]), sample())
    assert distance(sample(negative_prompt=["a red apple"]), sample(guidance_scale=1)) < 0.1
    with pytest.raises(InputError, match=r"guidance_scale=1 makes no use of negative_prompt"):
        sample(negative_prompt=["a cat"], guidance_scale=1)


def test_the_end_of_a_long_caption_is_warned_of() -> None:
    long = "one two three four five six seven eight nine ten eleven twelve"
    with pytest.warns(UserWarning, match='does not see the end .* "eleven twelve"'):
        tiny_model("caption").sample(caption=[long], steps=1)
    with pytest.warns(UserWarning, match="eleven twelve"):
        tiny_model("caption").sample(caption=["a"], negative_prompt=[long], steps=1)


# ---- the command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image, a mask, the image with a transparent hole, and broken ones, in the working folder."""
    monkeypatch.chdir(tmp_path)
    source, mask = image(*ODD), hole(*ODD)
    Image.fromarray(source).save("photo.png")
    Image.fromarray(mask).save("mask.png")
    strokes = np.dstack([np.full((*ODD, 3), 255, np.uint8), mask * np.uint8(255)])
    Image.fromarray(strokes, "RGBA").save("strokes.png")  # a painter's sheet: white on nothing
    Image.fromarray(np.dstack([source, 255 - 200 * mask.astype(np.uint8)]), "RGBA").save("erased.png")
    Image.new("L", ODD[::-1]).save("nothing.png")
    Image.new("L", (16, 16), 255).save("other.png")
    Path("text.png").write_text("no image")
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["3", "--from", "photo.png", "--mask", "mask.png"],
        ["3", "--from", "photo.png", "--mask", "strokes.png", "--strength", "0.9"],
        ["3", "--from", "erased.png", "--mask", "alpha"],
        ["--prompts", "asked.jsonl"],
    ],
)
def test_holes_from_files(files: Path, words: list[str]) -> None:
    asked = {"class_id": 3, "image": "erased.png", "mask": "alpha"}
    Path("asked.jsonl").write_text(json.dumps(asked))
    sample_command(["runs/tiny", *words, "--steps", "4", "--out", "out"])
    made, mask = np.asarray(Image.open("out/000000.png")), hole(*ODD)
    assert np.array_equal(made[~mask], image(*ODD)[~mask])
    assert distance(made[mask], image(*ODD)[mask]) > 10
    told = read_settings(Path("out/000000.png"))
    assert (told["size"], told["repeats"]) == ("13x11", "5")
    assert "mask" in told


def test_holes_of_many_images_for_a_model_without_prompts(files: Path) -> None:
    words = ["--task", "inpainting", "photo.png", "erased.png", "--mask", "mask.png", "--count", "2", "--steps", "2"]
    sample_command(["runs/tiny", *words, "--out", "out"], None)
    assert len(list(Path("out").glob("0*.png"))) == 4


def test_variations_without_a_prompt(files: Path) -> None:
    words = ["--from", "photo.png", "--strength", "0.5", "--count", "2", "--steps", "4", "--trajectory", "--out", "out"]
    sample_command(["runs/tiny", *words], "caption")
    told = read_settings(Path("out/000001.png"))
    assert (told["init_image"], told["strength"], told["prompt"]) == ("photo.png", "0.5", "")
    with Image.open("out/000001_trajectory.webp") as animation:
        assert animation.n_frames == 3  # the start and two of four steps


def test_a_start_is_brought_to_the_size_asked_for(files: Path) -> None:
    words = [
        "2",
        "--from",
        "photo.png",
        "--size",
        "8x16",
        "--strength",
        "0.02",
        "--guidance-scale",
        "1",
        "--out",
        "out",
    ]
    sample_command(["runs/tiny", *words])
    made = np.asarray(Image.open("out/000000.png"))
    assert made.shape == (8, 16, 3)
    assert read_settings(Path("out/000000.png"))["init_image"] == "photo.png fitted to 8x16"


def test_a_sweep_of_strengths(files: Path) -> None:
    words = ["2", "--from", "photo.png", "--sweep", "strength=0.3,0.9", "--steps", "5", "--out", "out"]
    sample_command(["runs/tiny", *words])
    assert Path("out/sweep_strength.png").exists()


def test_a_negative_prompt(files: Path) -> None:
    words = ["a red apple", "--negative-prompt", "a cat", "--steps", "2", "--out", "out"]
    sample_command(["runs/tiny", *words], "caption")
    assert read_settings(Path("out/000000.png"))["negative_prompt"] == "a cat"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["3", "--strength", "0.5"], "--strength 0.5 needs an image"),
        (["3", "--from", "photo.png", "--strength", "0"], "--strength 0 is outside 1e-06 .. 1"),
        (
            ["3", "--from", "photo.png", "--strength", "0.1", "--steps", "2", "--spacing", "trailing"],
            "--strength 0.1 leaves none of 2",
        ),
        (["3", "--mask", "mask.png"], "--mask mask.png needs an image"),
        (["3", "--repeats", "3"], "--repeats 3 is for holes filled by a model that was not trained for it"),
        (["3", "--from", "photo.png", "--mask", "mask.png", "--repeats", "0"], "--repeats 0 is outside 1 and above"),
        (["3", "--from", "photo.png", "--mask", "nothing.png"], "mask=nothing.png has no hole"),
        (["3", "--from", "photo.png", "--mask", "other.png"], "image for 13x11, mask for 16x16 px"),
        (["3", "--from", "photo.png", "--mask", "alpha"], "photo.png has no transparent parts"),
        (["3", "--from", "nowhere.png"], "init_image=nowhere.png cannot be read"),
        (["3", "--from", "text.png"], "init_image=text.png cannot be read"),
        (["3", "--from", "photo.png", "--mask", "mask.png", "--size", "16"], "are for 13x11 px .* 16x16 are sampled"),
        (["3", "--negative-prompt", "a cat"], "--negative-prompt is a caption, and this model takes class_id"),
        (["12"], "class_id 12 is not a class of this model; classes: 0 .. 9"),
        (
            ["--task", "super_resolution", "photo.png"],
            "takes class_id as input, not low_resolution; give one trained for it",
        ),
        (["--task", "inpainting", "photo.png", "--mask", "mask.png"], "this model also reads class_id"),
        (["--task", "inpainting", "photo.png", "--from", "photo.png"], "--task inpainting names the images itself"),
        (["--task", "layout"], "--task layout needs files"),
        (["--task", "painting", "photo.png"], "--task"),
        (["--prompts", "half.jsonl"], "mask goes with image"),
    ],
)
def test_refusals_leave_no_folder(files: Path, words: list[str], message: str) -> None:
    Path("half.jsonl").write_text(json.dumps({"class_id": 3, "mask": "mask.png"}))
    with pytest.raises(InputError, match=message):
        sample_command(["runs/tiny", *words, "--out", "out"])
    assert not Path("out").exists()
