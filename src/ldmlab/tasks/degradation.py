"""Low-resolution images with degradation: blur, downsampling, noise and JPEG in a random order.

BSRGAN (Zhang et al., "Designing a Practical Degradation Model for Deep Blind Image Super-Resolution", ICCV 2021) as the
official super-resolution loader runs it: without the camera's model. Between steps an image is float32 (H, W, 3) in
[0, 1]; a step holds its random parameters.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]
Step = Callable[[Array], Array]
_JPEG_RATE = 0.9  # of the JPEG among the shuffled steps; another one always ends the list
_HALVED_RATE = 0.25  # of images that are halved before all steps, for factor 4 only
_LARGE_KERNEL = 25  # px, of the blur before every n-th pixel is taken
_INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
ANTIALIASED = -1  # bicubic, the kernel widened by the factor


@dataclass(frozen=True)
class Blur:
    """A Gaussian with the variances along two axes, turned by an angle."""

    size: int  # of the kernel, px; even ones lie half a pixel to the lower right
    variances: tuple[float, float]  # px^2
    angle: float = 0.0  # radians

    def __call__(self, image: Array) -> Array:
        if self.variances[0] != self.variances[1]:
            anchor = 2 * ((self.size - 1) // 2,)
            blurred = cv2.filter2D(image, -1, self.kernel(), anchor=anchor, borderType=cv2.BORDER_REFLECT_101)
            return np.asarray(blurred, np.float32)
        exponent = -0.5 * (np.arange(self.size) - (self.size - 1) / 2) ** 2 / self.variances[0]
        curve = np.exp(exponent - exponent.max())
        return _filtered_by_axis(image, np.asarray(curve / curve.sum()))

    def kernel(self) -> NDArray[np.float64]:
        """(size, size), sum 1."""
        x, y = np.meshgrid(*2 * [np.arange(self.size) - (self.size - 1) / 2])
        along = x * math.cos(self.angle) + y * math.sin(self.angle)
        across = x * math.sin(self.angle) - y * math.cos(self.angle)
        exponent = -0.5 * (along**2 / self.variances[0] + across**2 / self.variances[1])
        kernel = np.exp(exponent - exponent.max())  # the original gives 0 / 0 for narrow kernels of even size
        return np.asarray(kernel / kernel.sum())


@dataclass(frozen=True)
class Resize:
    """To a square of the side by one of the interpolations."""

    side: int  # px
    interpolation: int  # of OpenCV | ANTIALIASED

    def __call__(self, image: Array) -> Array:
        if self.interpolation != ANTIALIASED:
            resized = cv2.resize(image, (self.side, self.side), interpolation=self.interpolation)
        else:
            size, planes = (self.side, self.side), [Image.fromarray(plane) for plane in cv2.split(image)]
            resized = cv2.merge([np.asarray(plane.resize(size, Image.Resampling.BICUBIC)) for plane in planes])
        return np.clip(resized, 0, 1, dtype=np.float32)


@dataclass(frozen=True)
class Decimate:
    """Every `factor`-th pixel of a Gaussian blur that is centred on the factor x factor pixels that it replaces."""

    factor: int
    deviation: float  # of the blur, px

    def __call__(self, image: Array) -> Array:
        place = np.arange(_LARGE_KERNEL, dtype=np.float64)
        curve = np.exp(-0.5 * ((place - _LARGE_KERNEL // 2) / self.deviation) ** 2)
        moved = np.interp(place - (self.factor - 1) / 2, place, curve)  # linear, as the original shifts its kernel
        moved /= moved.sum()
        blurred = _filtered_by_axis(image, moved)
        return np.clip(blurred[:: self.factor, :: self.factor], 0, 1, dtype=np.float32)


@dataclass(frozen=True)
class Noise:
    """Gaussian, of each channel by itself, the same in all, or with correlated channels."""

    kind: str  # colour | grey | correlated
    level: int  # standard deviation in units of 1 / 255; correlated: the largest
    seed: int

    def __call__(self, image: Array) -> Array:
        rng, height, width = np.random.default_rng(self.seed), *image.shape[:2]
        if self.kind == "correlated":
            axes = np.linalg.svd(rng.random((3, 3)))[0]
            covariance = np.abs(axes.T @ np.diag(rng.random(3)) @ axes)
            values, vectors = np.linalg.eigh(covariance)
            mixed = (np.sqrt(np.abs(values)) * vectors).T.astype(np.float32)
            noise = rng.standard_normal((height, width, 3), np.float32) @ mixed
        else:
            noise = rng.standard_normal((height, width, 3 if self.kind == "colour" else 1), np.float32)
        return np.clip(image + np.float32(self.level / 255) * noise, 0, 1)


@dataclass(frozen=True)
class Jpeg:
    """Written and read again, with OpenCV's defaults for colour."""

    quality: int

    def __call__(self, image: Array) -> Array:
        pixels = _to_bytes(image)[..., ::-1]  # blue first
        data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1]
        read = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR))
        return (read[..., ::-1] / 255).astype(np.float32)


@dataclass(frozen=True)
class Bsr:
    """The full one; ranges hold both ends."""

    blurs: int = 2
    spread: float = 1.0  # multiplies the widths of blurs
    oval_sizes: range = range(7, 26, 2)  # of kernels with two variances, px
    round_sizes: range = range(7, 26, 2)
    resize_rate: float = 0.75  # of resizing by a random factor first, else blur and every n-th pixel
    noise: tuple[int, int] = (2, 25)  # of 255
    quality: tuple[int, int] = (30, 95)  # of JPEG

    def steps(self, size: int, factor: int, random: Any) -> list[Step]:
        """What is done to a square image of `size` px; the result has size / factor."""
        first: list[Step] = []
        small = size // factor
        if factor == 4 and random.random() < _HALVED_RATE:
            size, factor = size // 2, 2
            by = random.choice(_INTERPOLATIONS) if random.random() < 0.5 else ANTIALIASED
            first = [Resize(size, by)]
        order: list[Step | None] = [None, None]  # places of both resizings, whose own order stays
        order += [self._blur(factor, random) for _ in range(self.blurs)]
        order += [self._noise(random)]
        order += [Jpeg(random.randint(*self.quality))] if random.random() < _JPEG_RATE else []
        random.shuffle(order)
        fit = Resize(small, random.choice(_INTERPOLATIONS))
        resizings: Iterator[Step] = iter((self._shrink(size, factor, random), fit))
        shuffled: list[Step] = [next(resizings) if step is None else step for step in order]
        return [*first, *shuffled, Jpeg(random.randint(*self.quality))]

    def __call__(self, image: NDArray[np.uint8], factor: int, random: Any) -> NDArray[np.uint8]:
        """(3, S, S) => (3, S / factor, S / factor)."""
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0)).astype(np.float32) / 255
        for step in self.steps(len(pixels), factor, random):
            pixels = step(pixels)
        return np.ascontiguousarray(_to_bytes(pixels).transpose(2, 0, 1))

    def _blur(self, factor: int, random: Any) -> Blur:
        if random.random() < 0.5:
            widest = self.spread * (4 + factor)
            variances = widest * (1 - random.random()), widest * (1 - random.random())  # above 0
            return Blur(random.choice(self.oval_sizes), variances, math.pi * random.random())
        deviation = self.spread * (2 + 0.2 * factor) * (1 - random.random())
        return Blur(random.choice(self.round_sizes), (deviation**2, deviation**2))

    def _shrink(self, size: int, factor: int, random: Any) -> Step:
        """Below or above the target size; the second resizing corrects that."""
        if random.random() < self.resize_rate:
            return Resize(max(int(size / random.uniform(1, 2 * factor)), 1), random.choice(_INTERPOLATIONS))
        return Decimate(factor, random.uniform(0.1, 0.6 * factor))

    def _noise(self, random: Any) -> Noise:
        kind = random.choices(("colour", "grey", "correlated"), (0.4, 0.4, 0.2))[0]
        level = self.noise[1] if kind == "correlated" else random.randint(*self.noise)
        return Noise(kind, level, random.getrandbits(64))


LIGHT = Bsr(
    blurs=1,
    spread=0.25,
    oval_sizes=range(5, 15),
    round_sizes=range(5, 8),
    resize_rate=0.8,
    noise=(1, 2),
    quality=(80, 95),
)


def _filtered_by_axis(image: Array, curve: NDArray[np.float64]) -> Array:
    """Correlation with outer(curve, curve); the image is mirrored at its outermost pixels."""
    middle = (len(curve) - 1) // 2
    filtered = cv2.sepFilter2D(image, -1, curve, curve, anchor=(middle, middle), borderType=cv2.BORDER_REFLECT_101)
    return np.asarray(filtered, np.float32)


def _to_bytes(image: Array) -> NDArray[np.uint8]:
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
