"""A sample's files to plain values: image, fields, moments, maps and boxes.

No decoder named here unpickles or starts a program.
"""

import json
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.annotations import WHOLE, centre_square, checked_crop, cropped, mirrored, mirrored_box, nearest, within
from ldmlab.data.fields import checked_fields, required_fields, sample_fields
from ldmlab.data.shards import Files, image_ending
from ldmlab.data.transforms import to_rgb
from ldmlab.open_image import open_image

# what reading and decoding raise on a damaged sample; everything else is a fault of ours
BAD_SAMPLE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, EOFError, tarfile.TarError, zlib.error)
_NPY_HEADER = re.compile(
    rb"\{'descr': '<(f[248])', 'fortran_order': False, 'shape': \(((?:[1-9]\d{0,8}, )*[1-9]\d{0,8},?)\), \} *\n"
)
_NPY_START = b"\x93NUMPY\x01\x00"
MAPS = {"segmentation": "seg.png", "mask": "mask.png"}
_TURNED = (5, 6, 7, 8)  # values of the orientation tag that exchange width and height
_ORIENTATION = 0x0112
_WHITE = 128  # a mask's pixel from here on is hole


def reason(error: Exception) -> str:
    """What is wrong with a sample, in a few words."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def decode_image(files: Files, size: int | None, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The image, uint8 (3, H, W); with `size` its centre square, resized with antialiasing (bicubic)."""
    ending = image_ending(files)
    if ending is None:
        raise KeyError(f"no image among its files ({', '.join(sorted(files))})")
    image = _decoded(open_image(files[ending]), lambda opened: to_rgb(opened, background))
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def _decoded(opened: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`change` of an opened image; whatever a decoder raises on broken bytes becomes a ValueError."""
    with opened:
        try:
            return change(opened)
        except BAD_SAMPLE:
            raise
        except Exception as error:
            raise ValueError(f"the image cannot be decoded ({reason(error)})") from error


def decode_moments(files: Files, view: int, shape: tuple[int, ...] | None = None) -> NDArray[np.float32]:
    """Moments of one view, finite, float32 (2C or C, h, w), from a .npy of (views, 2C or C, h, w).

    shape: of one view, as the manifest has it; a sample of another one is a bad one.
    """
    moments = stored_view(files["npy"], view, axes=4)
    if shape is not None and moments.shape != shape:
        raise ValueError(f"moments of shape {moments.shape} instead of {shape}")
    if not np.isfinite(moments).all():
        raise ValueError("moments that are not finite")
    return moments.astype(np.float32)


def stored_view(data: bytes, view: int, axes: int, one_serves: bool = False) -> NDArray[Any]:
    """One entry along the first axis of a .npy with that many axes, as stored; `one_serves`: a single one for all."""
    begin = 10 + int.from_bytes(data[8:10], "little")  # magic, version, length of the header, header
    shape, dtype = _npy_header(data[:begin])
    if len(data) != begin + math.prod(shape) * dtype.itemsize:
        raise ValueError(f"moments or states of {len(data) - begin} bytes, which shape {shape} does not fill")
    view = 0 if one_serves and shape[:1] == (1,) else view
    if len(shape) != axes or view >= shape[0] or 0 in shape:
        raise ValueError(f"moments or states of shape {shape} have no view {view}")
    size = math.prod(shape[1:])
    return np.frombuffer(data, dtype, size, offset=begin + view * size * dtype.itemsize).reshape(shape[1:])


@lru_cache(maxsize=16)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type in the header of a .npy, byte for byte as numpy writes it; its own parser evaluates the text."""
    found = _NPY_HEADER.fullmatch(header, 10)
    if not header.startswith(_NPY_START) or len(header) % 64 or found is None:
        raise ValueError("moments or states in another form than .npy 1.0 of little-endian floats")
    shape = tuple(int(number) for number in found[2].replace(b" ", b"").split(b",") if number)
    return shape, np.dtype("<" + found[1].decode())


def decode_parts(files: Files, parts: Iterable[str], size: int | None) -> dict[str, Any]:
    """segmentation (H, W), mask uint8 (1, H, W), boxes and their crop; `size`: in the centre square at that size."""
    found: dict[str, Any] = {}
    for name in sorted(parts):
        if name == "segmentation":
            found[name] = _map(files, MAPS[name], size)
        elif name == "mask":
            found[name] = (_map(files, MAPS[name], size) >= _WHITE).astype(np.uint8)[None]
        elif name == "boxes":
            fields = required_fields(files, ("boxes",))
            crop = sample_fields(files).get("crop", list(WHOLE))
            found |= {"boxes": fields["boxes"], "crop": checked_crop(crop)}
            shape = image_shape(files) if size is not None else None
            if shape is not None:
                found |= centre_cropped(found, *shape)
    return found


def centre_cropped(fields: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """The fields with boxes relative to the image's centre square, and where that lies in the original."""
    if width == height:
        return fields
    square = centre_square(width, height)
    crop = within(square, fields.get("crop", WHOLE))
    return {**fields, "boxes": cropped(fields["boxes"], square), "crop": crop}


def boxes_following(files: Files) -> Files:
    """For an image that is about to be cropped to its centre square and left behind: boxes that follow it."""
    fields = checked_fields(sample_fields(files), ("boxes",))
    shape = image_shape(files)
    if "boxes" not in fields or shape is None or shape[0] == shape[1]:
        return files
    return {**files, "json": json.dumps(centre_cropped(fields, *shape), ensure_ascii=False).encode()}


def _map(files: Files, ending: str, size: int | None) -> NDArray[Any]:
    """Numbers (H, W) of a greyscale or palette image."""
    if ending not in files:
        raise KeyError(f"no file KEY.{ending}")
    opened = open_image(files[ending], ("PNG",))
    values = np.asarray(_decoded(opened, lambda image: image.convert("L") if image.mode == "1" else image.copy()))
    if values.ndim != 2:
        raise ValueError(f"KEY.{ending} has several channels; store one number a pixel")
    values = values if values.dtype == np.uint8 else values.astype(np.int64)
    return values if size is None else nearest(values, size, centre_square(values.shape[1], values.shape[0]))


def image_shape(files: Files) -> tuple[int, int] | None:
    """Upright width and height from the image's header; None for a sample without its image."""
    ending = image_ending(files)
    if ending is None:
        return None
    with open_image(files[ending]) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after rotation by its orientation tag."""
    turned = image.getexif().get(_ORIENTATION) in _TURNED
    return (image.height, image.width) if turned else image.size


def mirrored_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Left and right exchanged in all that lies on the image; moments have a mirrored view of their own."""
    turned: dict[str, Any] = {
        name: np.ascontiguousarray(sample[name][..., ::-1])
        for name in ("image", "segmentation", "mask")
        if name in sample
    }
    if "boxes" in sample:
        turned |= {"boxes": mirrored(sample["boxes"]), "crop": mirrored_box(sample["crop"])}
    return {**sample, **turned}


def missing_part(files: Files, parts: Iterable[str]) -> tuple[str, str] | None:
    """What a sample lacks of what a task starts from: the part, and how it is stored; None where it has all."""
    for part in sorted(parts):
        if part in MAPS and MAPS[part] not in files:
            return part, f"file KEY.{MAPS[part]}"
        if part == "boxes" and part not in sample_fields(files):
            return part, f"field {part} in KEY.json"
    return None
