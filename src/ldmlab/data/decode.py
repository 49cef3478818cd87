"""A sample's files to plain values: image, moments, stored states and fields; maps and boxes in `image_parts.py`.

No decoder named here unpickles or starts a program. Fields follow one rule for `pack`, `index` and the loaders:

| found | taken as |
|---|---|
| null, NaN, a caption that is an empty list | missing |
| caption: a list | its first entry; all of them stay as `captions` |
| caption: a number | text |
| class_id: 3, 3.0, "3" | 3; anything else makes the sample a bad one |
| half a surrogate pair | the replacement character |
"""

import json
import math
import re
import tarfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.annotations import BOXES, checked, middle_square, whole_class
from ldmlab.data.tars import Files, image_ending
from ldmlab.data.transforms import to_rgb
from ldmlab.open_image import open_image
from ldmlab.stored_names import ENCODER_PREFIX, maker_of

# what reading and decoding raise on a damaged sample; everything else is a fault of ours
BAD_SAMPLE: tuple[type[Exception], ...] = (OSError, ValueError, KeyError, EOFError, tarfile.TarError, zlib.error)
CAPTION, CLASS = "caption", "class_id"
_NPY_HEADER = re.compile(
    rb"\{'descr': '<(f[248])', 'fortran_order': False, 'shape': \(((?:[1-9]\d{0,8}, )*[1-9]\d{0,8},?)\), \} *\n"
)
_NPY_START = b"\x93NUMPY\x01\x00"
_DEEPEST = 40  # levels of lists and objects in KEY.json
_LONGEST_JSON, _LONGEST_TEXT = 1 << 24, 1 << 20  # bytes
_NO_CAPTION = ("nan", "null", "none", "<na>")


def decode_image(files: Files, size: int | None, background: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The image, uint8 (3, H, W); with `size` its centre square, resized with antialiasing (bicubic)."""
    ending = image_ending(files)
    if ending is None:
        raise KeyError(f"no image among its files ({', '.join(sorted(files))})")
    image = decoded(open_image(files[ending]), lambda opened: to_rgb(opened, background))
    if size is not None and image.size != (size, size):
        left, top, side = middle_square(*image.size)
        box = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return np.ascontiguousarray(np.asarray(image, np.uint8).transpose(2, 0, 1))


def decoded(opened: Image.Image, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`change` of an opened image; whatever a decoder raises on broken bytes becomes a ValueError."""
    with opened:
        try:
            return change(opened)
        except BAD_SAMPLE:
            raise
        except Exception as error:
            raise ValueError(f"the image cannot be decoded ({type(error).__name__}: {str(error)[:200]})") from error


def decode_moments(files: Files, view: int, shape: tuple[int, ...] | None = None) -> NDArray[Any]:
    """Moments of one view, finite, float16 or float32, (2C or C, h, w) as `shape` has it.

    From a .npy of (views, 2C or C, h, w).
    """
    moments = _stored_view(files, "npy", view, axes=4)
    if shape is not None and moments.shape != shape:
        raise ValueError(f"moments of shape {moments.shape} instead of {shape}")
    if not np.isfinite(moments).all():
        raise ValueError("moments that are not finite")
    return moments.astype(np.float16 if moments.dtype == np.float16 else np.float32)


def decode_states(files: Files, name: str, view: int, shapes: dict[str, tuple[int, ...]]) -> NDArray[Any]:
    """States of conditioner `name` for one view, or the only one there is, float16 (L, D); of encoders (D, h, w).

    shapes: by name, those of the first sample, which is noted there.
    """
    axes = 4 if name.startswith(ENCODER_PREFIX) else 3
    states = _stored_view(files, states_ending(name), view, axes, one_serves=True)
    if not np.isfinite(states).all():
        raise ValueError(f"states of {maker_of(name)} that are not finite")
    if states.shape != (first := shapes.setdefault(name, states.shape)):
        raise ValueError(f"states of {maker_of(name)} of shape {states.shape}, and {first} in the first sample")
    return states.copy()


def states_ending(name: str) -> str:
    """The file of a conditioner's stored states."""
    return f"{name.lower()}.states.npy"


def _stored_view(files: Files, ending: str, view: int, axes: int, one_serves: bool = False) -> NDArray[Any]:
    """One entry along the first axis of a .npy with that many axes, as stored; `one_serves`: a single one for all."""
    if (data := files.get(ending)) is None:
        raise ValueError(f"no .{ending} among its files ({', '.join(sorted(files))})")
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


def required_fields(files: Mapping[str, Any], names: Sequence[str], classes: int | None = None) -> dict[str, Any]:
    """The named fields of a sample; ValueError where it lacks one or one cannot be used."""
    known = sample_fields(files)
    if missing := [name for name in names if name not in known]:
        raise ValueError(f"no field {', '.join(missing)} (it has {', '.join(sorted(known)) or 'none'})")
    known = checked_fields(known, names, classes)
    found = {name: known[name] for name in names}
    for name, value in found.items():  # for any other field too, a list of texts is replaced by its first entry
        if isinstance(value, list) and value and isinstance(value[0], str):
            found[name] = value[0]
    return found


def stored_fields(files: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of a sample, validated; a null caption or class makes it a bad sample."""
    raw = _raw_fields(files)
    fields = clean_fields(raw)
    if null := [name for name in (CAPTION, CLASS) if name in raw and name not in fields]:
        raise ValueError(f"its {null[0]} is null, NaN or empty")
    return checked_fields(fields)


def sample_fields(files: Mapping[str, Any], names: Collection[str] = ()) -> dict[str, Any]:
    """`KEY.json` and what `KEY.txt` and `KEY.cls` add, those in `names` validated; ValueError where one is damaged."""
    return checked_fields(clean_fields(_raw_fields(files)), names)


def _raw_fields(files: Mapping[str, Any]) -> dict[str, Any]:
    data = files.get("json", b"{}")
    if len(data) > _LONGEST_JSON:
        raise ValueError(f"KEY.json has {len(data)} bytes; at most {_LONGEST_JSON} are read")
    try:
        fields: Any = json.loads(data)
    except RecursionError:
        raise ValueError("KEY.json is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("KEY.json is not an object")
    if "txt" in files and is_no_caption(fields.get(CAPTION)):
        fields[CAPTION] = _text(files["txt"])
    if "cls" in files and is_missing(fields.get(CLASS)):
        text = _text(files["cls"])
        fields[CLASS] = whole_class(text) if text.isdigit() else text
    return fields


def _text(data: bytes) -> str:
    if len(data) > _LONGEST_TEXT:
        raise ValueError(f"a text of {len(data)} bytes; at most {_LONGEST_TEXT} are read")
    return data.decode("utf-8-sig").strip()


def is_missing(value: Any) -> bool:
    """Null and NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_no_caption(value: Any) -> bool:
    """Null, NaN, and the words that programs write in their place."""
    return is_missing(value) or (isinstance(value, str) and value.strip().lower() in _NO_CAPTION)


def clean_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields without those that are missing, all text such that UTF-8 can hold it."""
    found = {_clean_text(str(name)): _clean(value) for name, value in fields.items() if not is_missing(value)}
    caption = found.get(CAPTION)
    if all(map(is_no_caption, caption)) if isinstance(caption, list) else is_no_caption(caption):
        found.pop(CAPTION, None)
    return found


def _clean(value: Any, depth: int = 0) -> Any:
    if depth > _DEEPEST:
        raise ValueError("KEY.json is nested too deeply")
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, list):
        return [_clean(entry, depth + 1) for entry in value]
    if isinstance(value, dict):
        return {_clean_text(str(name)): _clean(entry, depth + 1) for name, entry in value.items()}
    return value


def _clean_text(text: str) -> str:
    """Halves of surrogate pairs become the replacement character."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def checked_fields(
    fields: Mapping[str, Any], names: Collection[str] = (CAPTION, CLASS, BOXES), classes: int | None = None
) -> dict[str, Any]:
    """Fields, of which those in `names` are valid, class_id below `classes` where that is known; else ValueError."""
    found = dict(fields)
    if CAPTION in found and CAPTION in names:
        value = found[CAPTION]
        entries = value if isinstance(value, list) else [value]
        texts = [_caption(entry) for entry in entries if not is_no_caption(entry)]
        if not texts:
            raise ValueError("its list of captions is empty")
        if isinstance(value, list):
            found.setdefault("captions", texts)
        found[CAPTION] = texts[0]
    if CLASS in found and CLASS in names:
        found[CLASS] = whole_class(found[CLASS], classes)
    if BOXES in found and BOXES in names:
        found[BOXES] = checked(found[BOXES])
    return found


def _caption(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"its caption is a {type(value).__name__}, not a text")
    return str(value)
