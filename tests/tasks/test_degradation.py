"""Blind degradations: drawn steps have the published ranges and order, and each step does what it says."""

from collections import Counter
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.tasks.crop import Crop
from ldmlab.tasks.degradation import ANTIALIASED, LIGHT, Blur, Bsr, Decimate, Jpeg, Noise, Resize
from ldmlab.tasks.super_resolution import DEGRADATIONS, SuperResolution
from scenes import Scene, write_scenes

DRAWS = 4000
KINDS = {"bsr": Bsr(), "bsr_light": LIGHT}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[list[Any]]]:
    """Many lists of steps for 256 px and factor 4."""
    return {name: [kind.steps(256, 4, Random(n)) for n in range(DRAWS)] for name, kind in KINDS.items()}


def share(hits: int, of: int, expected: float) -> bool:
    """Within four standard errors."""
    return abs(hits / of - expected) <= 4 * (expected * (1 - expected) / of) ** 0.5


def without_halving(steps: list[Any]) -> tuple[bool, list[Any]]:
    """Whether the image is halved before all else, and what comes after."""
    halved = sum(isinstance(step, Resize | Decimate) for step in steps) == 3
    return halved, steps[1:] if halved else steps


@pytest.mark.parametrize("name", KINDS)
def test_steps_come_in_every_order_and_as_often_as_published(name: str, drawn: dict[str, list[list[Any]]]) -> None:
    blurs, resize_rate = (2, 0.75) if name == "bsr" else (1, 0.8)
    halved = before = jpegs = decimated = 0
    orders: Counter[str] = Counter()
    for steps in drawn[name]:
        was_halved, rest = without_halving(steps)
        assert not was_halved or steps[0].side == 128
        halved += was_halved
        assert isinstance(rest[-1], Jpeg)
        shuffled = rest[:-1]
        counts = Counter(type(step).__name__ for step in shuffled)
        assert counts["Blur"] == blurs
        assert counts["Noise"] == 1
        assert counts["Resize"] + counts["Decimate"] == 2
        assert counts["Jpeg"] <= 1
        jpegs += counts["Jpeg"]
        decimated += counts["Decimate"]
        shrink, fit = [n for n, step in enumerate(shuffled) if isinstance(step, Resize | Decimate)]
        assert shuffled[fit].side == 64
        noise = next(n for n, step in enumerate(shuffled) if isinstance(step, Noise))
        orders["noise, shrink, fit" if noise < shrink else "shrink, noise, fit" if noise < fit else "last"] += 1
        blur = next(n for n, step in enumerate(shuffled) if isinstance(step, Blur))
        before += blur < noise
    assert share(halved, DRAWS, 0.25)
    assert share(jpegs, DRAWS, 0.9)
    assert share(decimated, DRAWS, 1 - resize_rate)
    assert all(share(count, DRAWS, 1 / 3) for count in orders.values())  # any of three places, equally often
    assert share(before, DRAWS, 2 / 3 if blurs == 2 else 0.5)  # the first blur against one noise


@pytest.mark.parametrize(
    ("name", "spread", "sizes", "levels", "quality"),
    [
        ("bsr", 1.0, ({*range(7, 26, 2)}, {*range(7, 26, 2)}), (2, 25), (30, 95)),
        ("bsr_light", 0.25, ({*range(5, 15)}, {5, 6, 7}), (1, 2), (80, 95)),
    ],
)
def test_drawn_numbers_fill_the_published_ranges(
    name: str,
    spread: float,
    sizes: tuple[set[int], set[int]],
    levels: tuple[int, int],
    quality: tuple[int, int],
    drawn: dict[str, list[list[Any]]],
) -> None:
    plain = [steps for steps in drawn[name] if not without_halving(steps)[0]]
    found = {kind: [s for steps in plain for s in steps if isinstance(s, kind)] for kind in (Blur, Noise, Jpeg)}
    oval = [blur for blur in found[Blur] if blur.angle]
    even = [blur for blur in found[Blur] if not blur.angle]
    assert share(len(oval), len(found[Blur]), 0.5)
    assert ({blur.size for blur in oval}, {blur.size for blur in even}) == sizes
    uniform = np.array([blur.variances for blur in oval]).ravel() / (8 * spread)  # up to 4 + factor
    deviations = np.array([blur.variances[0] for blur in even]) ** 0.5 / (2.8 * spread)  # up to 2 + factor / 5
    angles = np.array([blur.angle for blur in oval]) / np.pi
    for values in (uniform, deviations, angles):
        assert 0 <= values.min() < 0.01
        assert 0.99 < values.max() <= 1
        assert abs(values.mean() - 0.5) <= 4 * (1 / 12 / len(values)) ** 0.5
    noises = Counter(step.kind for step in found[Noise])
    assert all(share(noises[kind], len(found[Noise]), p) for kind, p in (("colour", 0.4), ("grey", 0.4)))
    drawn_levels = {step.level for step in found[Noise] if step.kind != "correlated"}
    assert drawn_levels == {*range(levels[0], levels[1] + 1)}
    assert {step.level for step in found[Noise] if step.kind == "correlated"} == {levels[1]}
    assert {step.quality for step in found[Jpeg]} == {*range(quality[0], quality[1] + 1)}
    decimations = [step.deviation for steps in plain for step in steps if isinstance(step, Decimate)]
    assert 0.1 <= min(decimations) < 0.15
    assert 2.35 < max(decimations) <= 2.4
    first = [step.side for steps in plain for step in steps if isinstance(step, Resize) and step.side != 64]
    assert 32 <= min(first) < 34
    assert 250 < max(first) <= 256


def test_blur_is_a_correlation_with_a_gaussian_of_that_covariance() -> None:
    kernel = Blur(25, (5.0, 1.5), 0.7).kernel()
    place = np.arange(25) - 12.0
    x, y = np.meshgrid(place, place)
    turn = np.array([[np.cos(0.7), -np.sin(0.7)], [np.sin(0.7), np.cos(0.7)]])
    expected = turn @ np.diag([5.0, 1.5]) @ turn.T
    moments = [[(kernel * a * b).sum() for b in (x, y)] for a in (x, y)]
    assert kernel.sum() == pytest.approx(1)
    assert np.allclose(moments, expected, atol=0.02)
    image = np.random.default_rng(0).random((9, 9, 3), np.float32)
    for size in (5, 6, 7):  # scipy.ndimage.convolve(mode="mirror") has even kernels this way round
        blur = Blur(size, (1.5, 0.6), 0.4)
        lower, upper = (size - 1) // 2, size // 2
        padded = np.pad(image, ((lower, upper), (lower, upper), (0, 0)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(0, 1))
        assert np.allclose(blur(image), (windows * blur.kernel()).sum((-2, -1)), atol=1e-5)
    narrow = Blur(6, (1e-9, 1e-9)).kernel()
    assert np.allclose(narrow[2:4, 2:4], 0.25)  # the original divides zero by zero here


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_decimation_is_centred_on_the_pixels_it_stands_for(factor: int) -> None:
    ramp = np.linspace(0, 1, 30 * factor, dtype=np.float32)
    image = np.repeat(np.repeat(ramp[None, :, None], 30 * factor, 0), 3, 2)
    small = Decimate(factor, 1.3)(image)
    means = ramp.reshape(30, factor).mean(1)
    inner = slice(13, 17)
    assert small.shape == (30, 30, 3)
    assert np.allclose(small[inner, inner, 0], means[inner], atol=1e-4)


def test_resizing_noise_and_jpeg() -> None:
    pixels = np.asarray(Scene(3, 32, 32).image)
    image = pixels.astype(np.float32) / 255
    bicubic = np.asarray(Scene(3, 32, 32).image.resize((16, 16), Image.Resampling.BICUBIC)) / 255
    assert np.abs(Resize(16, ANTIALIASED)(image) - bicubic).max() < 1.1 / 255
    assert np.array_equal(Resize(16, cv2.INTER_AREA)(image), cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))
    grey = np.full((200, 200, 3), 0.5, np.float32)
    colour = (Noise("colour", 10, 1)(grey) - 0.5).reshape(-1, 3)
    assert np.allclose(colour.std(0), 10 / 255, rtol=0.03)
    assert np.abs(np.corrcoef(colour.T) - np.eye(3)).max() < 0.03
    same = Noise("grey", 10, 1)(grey)
    assert np.array_equal(same[..., 0], same[..., 1])
    correlated = (Noise("correlated", 25, 2)(grey) - 0.5).reshape(-1, 3)
    assert 0 < correlated.std(0).max() <= 25 / 255
    assert np.abs(np.corrcoef(correlated.T) - np.eye(3)).max() > 0.05
    errors = [np.abs(Jpeg(quality)(image) - image).mean() for quality in (95, 60, 30)]
    assert errors[0] < errors[1] < errors[2]
    assert np.abs(Jpeg(95)(image).mean((0, 1)) - image.mean((0, 1))).max() < 0.01  # channels keep their order


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("size", "factor"), [(64, 4), (16, 4), (24, 3), (16, 2), (32, 8)])
def test_small_images_are_a_function_of_the_random_numbers(name: str, size: int, factor: int) -> None:
    task = SuperResolution(size, factor, degradation=name, crop=Crop("random", smallest=0.5))
    seen = set()
    for number in range(30):
        given = {"image": Scene(number % 3, 80, 70).pixels}
        derived, again = task.give(given, Random(number)), task.give(given, Random(number))
        small = derived["low_resolution"]
        assert (small.shape, small.dtype) == ((3, size // factor, size // factor), np.uint8)
        assert np.array_equal(small, again["low_resolution"])
        seen.add(small.tobytes())
    assert len(seen) == 30


def test_light_keeps_the_image_better() -> None:
    def error(name: str) -> float:
        errors = []
        for number in range(40):
            given = {"image": Scene(number, 128, 128).pixels}
            plain = SuperResolution(128).give(given, Random(number))["low_resolution"].astype(np.float64)
            small = SuperResolution(128, degradation=name).give(given, Random(number))["low_resolution"]
            assert abs(small.mean() - plain.mean()) < 12
            errors.append(((small - plain) ** 2).mean())
        return float(np.mean(errors))

    assert 0 < error("bsr_light") < error("bsr")


@pytest.mark.slow
def test_workers_give_the_same_small_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        write_scenes(tmp_path / split, 4, (40, 36))

    def first_batch(workers: int) -> Any:
        data = ShardData(f"{tmp_path}/train", f"{tmp_path}/val", image_size=32, workers=workers)
        given = data.with_task(SuperResolution(32, degradation="bsr_light"))
        return next(iter(given.train_loader(micro_batch=4)))["low_resolution"]

    assert (first_batch(0) == first_batch(2)).all()


def test_unknown_degradations_are_refused() -> None:
    assert DEGRADATIONS == ("bicubic", "bsr", "bsr_light")
    with pytest.raises(InputError, match=r"task.degradation=blurry is unknown; choose one of bicubic, bsr, bsr_light"):
        SuperResolution(64, degradation="blurry")


def test_every_pair_of_steps_swaps(drawn: dict[str, list[list[Any]]]) -> None:
    pairs: set[tuple[str, str]] = set()
    for steps in drawn["bsr"][:500]:
        names = [type(step).__name__ for step in without_halving(steps)[1][:-1]]
        pairs |= set(combinations(names, 2))
    kinds = {"Blur", "Noise", "Jpeg", "Decimate", "Resize"}
    missing = {(a, b) for a in kinds for b in kinds} - pairs
    assert missing == {("Noise", "Noise"), ("Jpeg", "Jpeg"), ("Decimate", "Decimate"), ("Resize", "Decimate")}
