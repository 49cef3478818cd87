"""A sample's files to plain values; only the decoders named here run, and none of them unpickles."""

import io
import math
import tarfile
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.data.reader import Files
from ldmlab.data.tar_samples import image_ending, sample_fields
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
