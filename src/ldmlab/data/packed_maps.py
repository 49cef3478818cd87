"""Masks and label maps that travel with a packed image: the same crop, nearest pixels, one number a pixel."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ldmlab.data.parts import MAPS

_NAMES = {"mask.png": "mask", "seg.png": "label map"}
_WHITE = 128  # a mask's pixel from here on is hole


def packed_map(content: bytes, ending: str, shape: tuple[int, int], target: tuple[int, int], square: bool) -> bytes:
    """PNG of a map for its packed image; ValueError says what is wrong with it.

    shape, target: width and height of the image as it came, upright, and as it is packed; square: of its middle.
    """
    name = _NAMES[ending]
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as opened:
            image = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError) as error:
        reason = "no PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        raise ValueError(f"its {name} cannot be read ({reason})") from None
    if image.size != shape:
        sizes = f"{image.width} x {image.height} pixels, the image {shape[0]} x {shape[1]}"
        raise ValueError(f"its {name} has {sizes}")
    values = _holes(image) if ending == MAPS["mask"] else _labels(image)
    left, top, side = _middle(*shape)
    if square:
        values, shape = values[top : top + side, left : left + side], (side, side)
    rows = ((np.arange(target[1]) + 0.5) * shape[1] / target[1]).astype(np.int64)
    columns = ((np.arange(target[0]) + 0.5) * shape[0] / target[0]).astype(np.int64)
    values = values[rows[:, None], columns]
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(file, "PNG")
    return file.getvalue()


def _middle(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the largest square in the middle, px."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def _holes(image: Image.Image) -> NDArray[np.uint8]:
    """0 or 255 by what the mask looks like, whatever its mode."""
    if image.mode.startswith("I"):
        raise ValueError("its mask has 16 bits; store black and white")
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min(initial=255) < 255:
        raise ValueError("its mask is partly transparent; store black and white")
    values = np.asarray(image.convert("L"))
    if values.max(initial=0) in range(1, _WHITE):
        raise ValueError(f"its mask's brightest pixel is {values.max()}; holes are white (255)")
    return np.where(values >= _WHITE, 255, 0).astype(np.uint8)


def _labels(image: Image.Image) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """The stored numbers; of a palette its indices."""
    values = np.asarray(image, np.uint8) if image.mode == "1" else np.asarray(image)
    if values.ndim != 2:
        raise ValueError("its label map has several channels; store one number a pixel")
    if values.dtype != np.uint8 and not 0 <= values.min(initial=0) <= values.max(initial=0) < 2**16:
        raise ValueError("its label map has numbers outside 0 .. 65535")
    return values if values.dtype == np.uint8 else values.astype(np.uint16)
