"""A faint watermark in the pixels that says "made by a model of ldmlab", read after JPEG and crops.

A fixed pattern W of 64 x 64 px with waves of 3.3 to 10 px repeats over the image, stronger where the image is busy:
    y' = clip(y, 1.5 a, 255 - 1.5 a) + a W,    a = min(s (2 + 0.13 std of y nearby), 8),
    s = 0.6 sqrt(128 px / shorter side), 0.35 to 0.85
Reading folds the image onto one tile and correlates it with W at all shifts, so that a crop need not know its place:
    score = (max - mean) / std of the correlations; above 6.5 it counts as marked
It says nothing of who made the image, and someone who wants to can remove it; a signed manifest says more
(`credentials`), but is lost when the file is written again.
"""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ldmlab.errors import InputError

TILE = 64  # px
THRESHOLD = 6.5
LEAST_SIDE = 64  # px
_LUMA = np.array([0.299, 0.587, 0.114])


def _pattern() -> tuple[np.ndarray, np.ndarray]:
    """W with deviation 1, cut at 2, and its spectrum; the same on every machine: RandomState's numbers are fixed."""
    spectrum = np.fft.fft2(np.random.RandomState(1789).standard_normal((TILE, TILE)))
    frequency = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.fftfreq(TILE)[None])
    spectrum = np.where((frequency >= 0.1) & (frequency <= 0.3), spectrum / np.abs(spectrum), 0)
    waves = np.fft.ifft2(spectrum).real
    return np.clip(waves / waves.std(), -2, 2), spectrum


_TILE, _SPECTRUM = _pattern()


def watermarked(image: np.ndarray) -> np.ndarray:
    """The image, uint8 (H, W, 3), with the watermark; InputError below `LEAST_SIDE`, where it could not be read."""
    height, width = image.shape[:2]
    check_size(height, width)
    strength = float(np.clip(0.6 * np.sqrt(128 / min(height, width)), 0.35, 0.85))
    amplitude = np.minimum(strength * (2 + 0.13 * _spread(image @ _LUMA)), 8)[..., None]
    waves = np.tile(_TILE, (-(-height // TILE), -(-width // TILE)))[:height, :width, None]
    room = np.clip(image.astype(float), 1.5 * amplitude, 255 - 1.5 * amplitude)  # white has room for waves too
    return np.clip(np.rint(room + amplitude * waves), 0, 255).astype(np.uint8)


def check_size(height: int, width: int) -> None:
    """InputError for an image that is too small."""
    if min(height, width) < LEAST_SIDE:
        raise InputError(
            f"--mark watermark: an image of {height}x{width} px holds no readable watermark; sample at "
            f"{LEAST_SIDE} px or more, or leave it out."
        )


def watermark_score(image: np.ndarray) -> float:
    """How clearly the watermark stands out in uint8 (H, W, 3): about 3 to 5 without it, `THRESHOLD` decides."""
    luma = image @ _LUMA
    residual = (luma - _blurred(luma)) / (_spread(luma) + 4)
    height, width = luma.shape
    whole = np.zeros((-(-height // TILE) * TILE, -(-width // TILE) * TILE))
    whole[:height, :width] = residual - residual.mean()
    folded = whole.reshape(len(whole) // TILE, TILE, -1, TILE).sum((0, 2))
    found = np.fft.fft2(folded)
    found = np.where(_SPECTRUM != 0, found / np.maximum(np.abs(found), 1e-9) ** 0.9, 0)
    correlation = np.fft.ifft2(found * np.conj(_SPECTRUM)).real
    return float((correlation.max() - correlation.mean()) / max(correlation.std(), 1e-12))


def _blurred(luma: np.ndarray, reach: int = 4) -> np.ndarray:
    """The mean of the square of 9 px around each pixel."""
    side = 2 * reach + 1
    rows = sliding_window_view(np.pad(luma, reach, mode="symmetric"), side, axis=0).mean(-1)
    return np.asarray(sliding_window_view(rows, side, axis=1).mean(-1))


def _spread(luma: np.ndarray) -> np.ndarray:
    """The standard deviation of the same square."""
    return np.sqrt(np.maximum(_blurred(luma * luma) - _blurred(luma) ** 2, 0))
