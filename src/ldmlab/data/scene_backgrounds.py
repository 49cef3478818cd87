"""Textured backgrounds of scenes: two or three pale colours of one hue in a pattern."""

import colorsys
import random
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Share = NDArray[np.floating[Any]]  # (H, W), of the second colour
HUES = {"red": 0.0, "yellow": 0.14, "green": 0.33, "blue": 0.58, "purple": 0.77, "grey": None}


def background(drawn: random.Random, size: int) -> tuple[NDArray[np.uint8], str]:
    """Pixels (size, size, 3), and what they are called: "blue stripes"."""
    pattern = drawn.choice(sorted(PATTERNS))
    colour = drawn.choice(sorted(HUES))
    light, dark = (np.array(_pale(HUES[colour], value, drawn), np.float32) for value in (0.95, 0.72))
    share = PATTERNS[pattern](drawn, size)
    grain = 24 * (_clouds(drawn, size, 8) - 0.5)
    pixels = np.empty((size, size, 3), np.uint8)
    for channel in range(3):  # a plane at a time: numpy is slow over an innermost axis of three
        pixels[..., channel] = np.clip(light[channel] + (dark - light)[channel] * share + grain, 0, 255)
    return pixels, f"{colour} {pattern}"


def _pale(hue: float | None, value: float, drawn: random.Random) -> list[float]:
    """RGB in 0 .. 255."""
    saturation = 0.0 if hue is None else drawn.uniform(0.2, 0.45)
    shifted = ((hue or 0.0) + drawn.uniform(-0.03, 0.03)) % 1
    return [255 * part for part in colorsys.hsv_to_rgb(shifted, saturation, value)]


def _clouds(drawn: random.Random, size: int, cells: int) -> Share:
    """Smooth random values in 0 .. 1."""
    coarse = np.random.default_rng(drawn.getrandbits(64)).integers(0, 256, (cells, cells), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(smooth, np.float32) / 255


def _waves(drawn: random.Random, size: int) -> tuple[Share, Share]:
    """Two waves at right angles, in -1 .. 1, 3 to 7 periods an image."""
    angle, periods = drawn.uniform(0, np.pi), drawn.uniform(3, 7)
    steps = (np.arange(size) + 0.5) / size * (2 * np.pi * periods)
    along, across = np.cos(angle) * steps, np.sin(angle) * steps
    phases = drawn.uniform(0, 2 * np.pi), drawn.uniform(0, 2 * np.pi)
    return _sine_of_sum(across, along + phases[0]), _sine_of_sum(along, phases[1] - across)


def _sine_of_sum(rows: Share, columns: Share) -> Share:
    """sin(rows[i] + columns[j]) in four sines a row and column."""
    return np.outer(np.sin(rows), np.cos(columns)) + np.outer(np.cos(rows), np.sin(columns))


def _edge(value: Share) -> Share:
    """A border between two colours, about one pixel of 64 wide."""
    return np.clip(0.5 + value * 2.5, 0, 1).astype(np.float32)


def _stripes(drawn: random.Random, size: int) -> Share:
    return _edge(_waves(drawn, size)[0])


def _checks(drawn: random.Random, size: int) -> Share:
    first, second = _waves(drawn, size)
    return _edge(first * second)


def _dots(drawn: random.Random, size: int) -> Share:
    first, second = _waves(drawn, size)
    return _edge(first + second - 0.8)


def _gradient(drawn: random.Random, size: int) -> Share:
    angle = drawn.uniform(0, 2 * np.pi)
    steps = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    slope = np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None]
    return np.clip(0.5 + 0.8 * slope, 0, 1).astype(np.float32)


def _cloudy(drawn: random.Random, size: int) -> Share:
    return _clouds(drawn, size, 5)


PATTERNS: dict[str, Callable[[random.Random, int], Share]] = {
    "checks": _checks,
    "clouds": _cloudy,
    "dots": _dots,
    "gradient": _gradient,
    "stripes": _stripes,
}
