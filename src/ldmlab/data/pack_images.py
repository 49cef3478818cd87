"""The workers of a pack: a part of a shard in, its tar bytes out; parts are independent of each other."""

import io
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ldmlab.data.decode import MAPS, centre_cropped, upright_size
from ldmlab.data.fields import BOXES, checked_fields, clean_fields, stored_fields
from ldmlab.data.image_sources import Item
from ldmlab.data.shards import image_ending, read_range, tar_bytes
from ldmlab.data.transforms import Transform
from ldmlab.errors import InputError
from ldmlab.files import open_regular
from ldmlab.open_image import MAX_BYTES, open_image

FORMATS = ("webp", "png", "jpg")


@dataclass(frozen=True)
class Encoding:
    """File format of packed images; webp without a quality is lossless."""

    format: str = "webp"
    quality: int | None = None  # 1 .. 100

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError(f"format={self.format} is unknown; choose one of {', '.join(FORMATS)}.")
        if self.quality is not None and (self.format == "png" or not 1 <= self.quality <= 100):
            raise InputError(f"quality={self.quality} with format={self.format}; give 1 .. 100 to webp or jpg only.")

    def __call__(self, image: Image.Image) -> bytes:
        """RGB image => file content."""
        file = io.BytesIO()
        if self.format == "png":
            image.save(file, "PNG")
        elif self.format == "jpg":
            image.save(file, "JPEG", quality=self.quality or 95, subsampling=0)
        elif self.quality is None:
            image.save(
                file, "WEBP", lossless=True, quality=50, method=2
            )  # here quality is effort: 3 x faster, 5% larger
        else:
            image.save(file, "WEBP", quality=self.quality, method=4)
        return file.getvalue()


@dataclass(frozen=True)
class Part:
    """Encoded samples, ready to be written one after the other."""

    data: bytes
    offsets: list[int]  # of each sample within `data`
    fields: list[str]
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    small: list[str] = field(default_factory=list)  # names of images below the least side


def encode_part(items: Sequence[Item], transform: Transform, encoding: Encoding, min_side: int) -> Part:
    """Decodes, transforms and encodes each image; a fault in one is noted and the next one is taken."""
    data, offsets, names = bytearray(), [], dict[str, None]()
    bad, small = [], []
    for item in items:
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd metadata and large images
                image, fields, maps = _open(item)
                if min(image.size) < min_side:
                    small.append(item.name)
                    continue
                fields = {**fields, "original_width": image.width, "original_height": image.height}
                shape = upright_size(image)
                if fields.get(BOXES) and transform.square:
                    fields = centre_cropped(fields, *shape)
                packed = transform(image)
                maps = {e: packed_map(c, e, shape, packed.size, transform.square) for e, c in maps.items()}
                content = encoding(packed)
        except Exception as error:  # whatever a decoder raises on broken bytes
            bad.append((item.name, _reason(error)))
            continue
        offsets.append(len(data))
        names.update(dict.fromkeys(fields))
        data += tar_bytes(f"{item.key}.{encoding.format}", content)
        data += tar_bytes(f"{item.key}.json", json.dumps(fields, ensure_ascii=False).encode())
        for ending, stored in sorted(maps.items()):
            data += tar_bytes(f"{item.key}.{ending}", stored)
    return Part(bytes(data), offsets, list(names), bad, small)


def _open(item: Item) -> tuple[Image.Image, dict[str, Any], dict[str, bytes]]:
    """The image, not yet decoded, its fields, and the files of its maps by ending."""
    if item.fault:
        raise ValueError(item.fault)
    fields = clean_fields(item.fields)
    if item.span is None:
        content = _read(item.path)
        maps = {ending: _read_map(path) for ending, path in item.maps.items()}
    else:
        sample = read_range(item.path, *item.span)
        image = image_ending(sample)
        if image is None:
            raise ValueError("holds no image")
        content, fields = sample[image], fields or stored_fields(sample)
        maps = {ending: sample[ending] for ending in MAPS.values() if ending in sample}
    if not content:
        raise ValueError("is empty")
    return open_image(content), checked_fields(fields), maps


def _read(path: str) -> bytes:
    with open_regular(Path(path)) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"has {size} bytes; at most {MAX_BYTES} are read")
        return opened.read()


def _read_map(path: str) -> bytes:
    try:
        return _read(path)
    except FileNotFoundError:
        raise ValueError(f"its {os.path.basename(path)} is missing") from None


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    if isinstance(error, Image.UnidentifiedImageError):
        return "is not an image"
    return str(error) or type(error).__name__


_NAMES = {"mask.png": "mask", "seg.png": "label map"}
_WHITE = 128  # a mask's pixel from here on is hole


def packed_map(content: bytes, ending: str, shape: tuple[int, int], target: tuple[int, int], square: bool) -> bytes:
    """PNG of a map for its packed image; ValueError names what is wrong with it.

    shape, target: width and height of the image as it came, upright, and as it is packed; square: of its middle.
    """
    name = _NAMES[ending]
    try:
        with open_image(content, ("PNG",)) as opened:
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
    """0 or 255 by the mask's displayed brightness, in any mode."""
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
