"""The watermark is read after JPEG and a crop of half of the area, and in no image that has none."""

import numpy as np
import pytest
from emoji_images import as_jpeg, emoji, half

from ldmlab.errors import InputError
from ldmlab.marking.watermark import THRESHOLD, watermark_score, watermarked


@pytest.mark.slow
@pytest.mark.parametrize(("size", "psnr"), [(128, 34.5), (256, 39)])  # px, dB: faint
def test_read_after_jpeg_75_and_a_crop_of_half_of_the_area(size: int, psnr: float) -> None:
    rng = np.random.default_rng(0)
    images = emoji(100, size)
    marked = [watermarked(image) for image in images]
    scores = [watermark_score(half(as_jpeg(image), rng)) for image in marked]
    assert sum(score > THRESHOLD for score in scores) >= 95
    assert all(watermark_score(image) > THRESHOLD for image in marked)
    noise = [np.square(a.astype(float) - b).mean() for a, b in zip(images, marked, strict=True)]
    assert 10 * np.log10(255**2 / np.mean(noise)) > psnr


def test_small_samples_keep_it_as_whole_files() -> None:
    marked = [watermarked(image) for image in emoji(100, 64)]
    assert all(watermark_score(image) > THRESHOLD for image in marked)
    assert sum(watermark_score(as_jpeg(image)) > THRESHOLD for image in marked) >= 95
    with pytest.raises(InputError, match="32x32 px holds no readable watermark"):
        watermarked(emoji(1, 32)[0])


def test_photographs_keep_it_too() -> None:
    """Noise of all frequencies, and a gradient, in colour."""
    rng = np.random.default_rng(1)
    for octaves in (8, 32, 128):
        coarse = rng.random((octaves, octaves, 3))
        rows = np.repeat(np.repeat(coarse, 256 // octaves, 0), 256 // octaves, 1)
        image = (255 * rows).astype(np.uint8)
        assert watermark_score(image) < THRESHOLD
        assert watermark_score(half(as_jpeg(watermarked(image)), rng)) > THRESHOLD


def test_the_pattern_is_the_same_for_ever() -> None:
    """Files marked by an earlier version are read: the pixels of a grey image as the first version wrote them."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    found = watermarked(grey)[:2, :6, 0].astype(int)
    assert found.tolist() == [[125, 128, 131, 130, 127, 127], [125, 127, 129, 127, 125, 126]]


@pytest.mark.slow
def test_no_false_alarm_in_10000_crops() -> None:
    rng = np.random.default_rng(2)
    images = emoji(2000, 128)
    alarms = 0
    for number in range(10_000):
        image = images[number % len(images)]
        image = as_jpeg(image, int(rng.integers(50, 96))) if number % 2 else image
        alarms += watermark_score(half(image, rng)) > THRESHOLD
    assert alarms <= 1
