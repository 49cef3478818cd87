"""A sample's files to plain values: image, fields, moments, maps and boxes.

No decoder named here unpickles or starts a program.
"""

import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.annotations import WHOLE, centre_square, checked, cropped, mirrored, mirrored_box, nearest, within
from ldmlab.data.shards import Files, image_ending, sample_fields
from ldmlab.data.transforms import to_rgb
from ldmlab.errors import InputError

# what reading and decoding raise on a damaged sample; everything else is a fault of ours
BAD_SAMPLE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, EOFError, SyntaxError),
    *(tarfile.TarError, zlib.error, Image.DecompressionBombError),
)


def decode_image(files: Files, size: int | None, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The image, uint8 (3, H, W); with `size` its centre square, resized with antialiasing (bicubic)."""
    ending = image_ending(files)
    if ending is None:
        raise KeyError(f"no image among its files ({', '.join(sorted(files))})")
    with Image.open(io.BytesIO(files[ending])) as opened:
        image = to_rgb(opened, background)
    if size is not None and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def decode_moments(files: Files, view: int) -> NDArray[np.float32]:
    """Moments of one view, float32 (2C or C, h, w), from a .npy of (views, 2C or C, h, w)."""
    return stored_view(files["npy"], view, axes=4).astype(np.float32)


def stored_view(data: bytes, view: int, axes: int, one_serves: bool = False) -> NDArray[Any]:
    """One entry along the first axis of a .npy with that many axes, as stored; `one_serves`: a single one for all."""
    begin = 10 + int.from_bytes(data[8:10], "little")  # magic, version, length of the header, header
    shape, dtype = _npy_header(data[:begin])
    view = 0 if one_serves and shape[:1] == (1,) else view
    if len(shape) != axes or view >= shape[0]:
        raise ValueError(f"moments or states of shape {shape} have no view {view}")
    size = math.prod(shape[1:])
    return np.frombuffer(data, dtype, size, offset=begin + view * size * dtype.itemsize).reshape(shape[1:])


@lru_cache(maxsize=16)
def _npy_header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type in the header of a .npy; numpy's parser takes half as long as all the rest of a read."""
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("moments or states in another version of .npy than 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    if fortran_order or dtype.kind != "f":
        raise ValueError(f"moments or states stored as {dtype}, fortran_order={fortran_order}")
    return shape, dtype


def decode_fields(files: Files, fields: Sequence[str]) -> dict[str, Any]:
    """The fields asked for, from KEY.json, KEY.txt (caption) and KEY.cls (class_id)."""
    known = sample_fields(files)
    missing = [name for name in fields if name not in known]
    if missing:
        raise KeyError(f"no field {', '.join(missing)} (it has {', '.join(sorted(known)) or 'none'})")
    return {name: known[name] for name in fields}


def check_fields(label: str, files: Files, fields: Sequence[str]) -> None:
    """Refuse fields that the first sample of a data set lacks."""
    try:
        decode_fields(files, fields)
    except KeyError as missing:
        raise InputError(
            f"data.fields={list(fields)}: sample {label} has {missing.args[0]}; "
            "ask only for fields the data carry, or pack them with `ldmlab pack`."
        ) from None


MAPS = {"segmentation": "seg.png", "mask": "mask.png"}
_TURNED = (5, 6, 7, 8)  # values of the orientation tag that exchange width and height
_ORIENTATION = 0x0112
_WHITE = 128  # a mask's pixel from here on is hole


def decode_parts(files: Files, parts: Iterable[str], size: int | None) -> dict[str, Any]:
    """segmentation (H, W), mask uint8 (1, H, W), boxes and their crop; `size`: in the centre square at that size."""
    found: dict[str, Any] = {}
    for name in sorted(parts):
        if name == "segmentation":
            found[name] = _map(files, MAPS[name], size)
        elif name == "mask":
            found[name] = (_map(files, MAPS[name], size) >= _WHITE).astype(np.uint8)[None]
        elif name == "boxes":
            fields = sample_fields(files)
            if "boxes" not in fields:
                raise KeyError("no field boxes")
            found |= {"boxes": checked(fields["boxes"]), "crop": fields.get("crop", list(WHOLE))}
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
    fields = sample_fields(files)
    shape = image_shape(files)
    if "boxes" not in fields or shape is None or shape[0] == shape[1]:
        return files
    return {**files, "json": json.dumps(centre_cropped(fields, *shape), ensure_ascii=False).encode()}


def _map(files: Files, ending: str, size: int | None) -> NDArray[Any]:
    """Numbers (H, W) of a greyscale or palette image."""
    if ending not in files:
        raise KeyError(f"no file KEY.{ending}")
    with Image.open(io.BytesIO(files[ending]), formats=("PNG",)) as image:
        values = np.asarray(image.convert("L") if image.mode == "1" else image)
    if values.ndim != 2:
        raise ValueError(f"KEY.{ending} has several channels; store one number a pixel")
    values = values if values.dtype == np.uint8 else values.astype(np.int64)
    return values if size is None else nearest(values, size, centre_square(values.shape[1], values.shape[0]))


def image_shape(files: Files) -> tuple[int, int] | None:
    """Upright width and height from the image's header; None for a sample without its image."""
    ending = image_ending(files)
    if ending is None:
        return None
    with Image.open(io.BytesIO(files[ending])) as image:
        return upright_size(image)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height once the image is turned as its orientation tag says."""
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


def check_parts(label: str, files: Files, parts: Iterable[str]) -> None:
    """Refuse a task for which the first sample of a data set has nothing."""
    for part in sorted(parts):
        stored = f"file KEY.{MAPS[part]}" if part in MAPS else f"field {part} in KEY.json"
        if (part in MAPS and MAPS[part] not in files) or (part == "boxes" and part not in sample_fields(files)):
            raise InputError(
                f"task: it starts from {part}, but sample {label} has no {stored}; add it to the shards, "
                "or choose another task."
            )
