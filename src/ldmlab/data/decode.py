"""A sample's files to plain values; only the decoders named here run, and none of them unpickles."""

import io
import tarfile
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.data.reader import Files
from ldmlab.data.tar_samples import picture_ending, sample_fields
from ldmlab.data.transforms import to_rgb
from ldmlab.errors import InputError

# what reading and decoding raise on a damaged sample; everything else is a fault of ours
BAD_SAMPLE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, EOFError, SyntaxError),
    *(tarfile.TarError, zlib.error, Image.DecompressionBombError),
)


def decode_image(files: Files, size: int | None, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The picture, uint8 (3, H, W); with `size` its centre square, resized with antialiasing (bicubic)."""
    ending = picture_ending(files)
    if ending is None:
        raise KeyError(f"no picture among its files ({', '.join(sorted(files))})")
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
    moments = np.load(io.BytesIO(files["npy"]), allow_pickle=False)
    if moments.ndim != 4 or view >= len(moments):
        raise ValueError(f"moments of shape {moments.shape} have no view {view}")
    return np.asarray(moments[view], np.float32)


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
