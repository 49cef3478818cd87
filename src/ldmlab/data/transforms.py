"""Images of any mode to RGB, then crop and resize by the rules of the paper's data sets.

Origins: `short_side_bilinear_no_antialias` the loaders of CelebA-HQ and FFHQ, `lsun` the LSUN loader, `adm` the centre
crop of the ADM references, `sr3_area` the SR3 paper's high-resolution images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageColor, ImageOps

from ldmlab.errors import InputError, check_side, one_of

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """First frame, upright, 8 bits, transparent pixels laid over `background`."""
    image.seek(0)
    image = ImageOps.exif_transpose(_eight_bits(image))
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float grayscale to 8 bits; Pillow's own conversion would clip at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        if values.size and not 0 <= values.min() <= values.max() <= 1:
            raise ValueError("float image with values outside 0 .. 1")
        values = values * 255
    elif image.mode != "I" or values.max(initial=0) > 255:
        values = values / 257  # 65535 => 255
    reduced = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    reduced.info = dict(image.info)
    reduced.info.pop("transparency", None)  # a 16-bit grey level, meaningless now
    return reduced


def parse_colour(text: str) -> Colour:
    """`white`, `#ff8800` or `255,136,0`."""
    try:
        parts = [int(part) for part in text.split(",")] if "," in text else ImageColor.getrgb(text)[:3]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part <= 255 for part in parts):
        raise InputError(f"background={text} is not a colour; write a name, #rrggbb or R,G,B.")
    return parts[0], parts[1], parts[2]


@dataclass(frozen=True)
class Transform:
    """A crop and resize rule with its target side; `keep` leaves the size alone."""

    size: int | None = 256  # side in pixels, None only with rule=keep
    rule: str = "centre"
    background: Colour = WHITE

    def __post_init__(self) -> None:
        one_of("crop", self.rule, RULES)
        if self.rule == "keep" and self.size is not None:
            raise InputError(f"crop=keep leaves images as they are, so size={self.size} cannot be met; drop one.")
        if self.rule != "keep":
            check_side("size", self.size)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Any image => RGB, `size` x `size` (any size with `keep`, the long side uncut with `short_side`)."""
        return RULES[self.rule](to_rgb(image, self.background), self.size or 0)

    @property
    def square(self) -> bool:
        """Whether all results have one size."""
        return self.rule not in ("keep", "short_side")


def _scaled(image: Image.Image, size: int) -> tuple[int, int]:
    """Width and height with the short side at `size`."""
    scale = size / min(image.size)
    return max(size, round(image.width * scale)), max(size, round(image.height * scale))


def _centre_crop(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _short_side(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` with antialiased bicubic, nothing cut: for random crops in training."""
    return image.resize(_scaled(image, size), Image.Resampling.BICUBIC)


def _centre(image: Image.Image, size: int) -> Image.Image:
    return _centre_crop(_short_side(image, size), size)


def _lsun(image: Image.Image, size: int) -> Image.Image:
    """The centre square first, then bicubic."""
    return _centre_crop(image, min(image.size)).resize((size, size), Image.Resampling.BICUBIC)


def _adm(image: Image.Image, size: int) -> Image.Image:
    """Exact halving with a box filter while the short side is at least twice the target, bicubic, centre crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    return _centre(image, size)


def _short_side_bilinear_no_antialias(image: Image.Image, size: int) -> Image.Image:
    """Short side to `size` by four neighbours with half-pixel centres, then the centre crop."""
    width, height = _scaled(image, size)
    pixels = np.asarray(image).astype(np.float32)  # (H, W, 3)
    top, bottom, down = _neighbours(image.height, height, (height - size) // 2, size)
    left, right, across = _neighbours(image.width, width, (width - size) // 2, size)
    across = across[:, None]
    upper = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across  # (size, size, 3)
    lower = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    down = down[:, None, None]
    return _from_float(upper * (1 - down) + lower * down)


def _neighbours(old: int, new: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both source positions and the share of the second, for target positions first .. first + count - 1."""
    centre = (np.arange(first, first + count) + 0.5) * (old / new) - 0.5
    low = np.floor(centre)
    at = [np.clip(place, 0, old - 1).astype(np.int64) for place in (low, low + 1)]
    return at[0], at[1], (centre - low).astype(np.float32)


def _sr3_area(image: Image.Image, size: int) -> Image.Image:
    """The largest centre square, each target pixel the mean over the area it covers."""
    side = min(image.size)
    pixels = np.asarray(_centre_crop(image, side)).astype(np.float32)  # (side, side, 3)
    edges = np.arange(size + 1) * (side / size)
    low, high = edges[:-1, None], edges[1:, None]
    place = np.arange(side)[None, :]
    cover = np.clip(np.minimum(high, place + 1) - np.maximum(low, place), 0, None)
    weights = (cover / cover.sum(1, keepdims=True)).astype(np.float32)  # (size, side)
    rows = np.tensordot(weights, pixels, axes=(1, 0))  # (size, side, 3)
    return _from_float(np.tensordot(weights, rows, axes=(1, 1)).transpose(1, 0, 2))


def _from_float(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


RULES: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "centre": _centre,
    "short_side": _short_side,
    "short_side_bilinear_no_antialias": _short_side_bilinear_no_antialias,
    "lsun": _lsun,
    "adm": _adm,
    "sr3_area": _sr3_area,
    "keep": lambda image, size: image,
}
