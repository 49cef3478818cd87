"""What lies on an image and is packed, cropped, resized and mirrored with it: boxes, masks and label maps."""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ldmlab import annotations
from ldmlab.annotations import BOXES
from ldmlab.data.decode import decoded, required_fields, sample_fields
from ldmlab.data.tars import Files, image_ending
from ldmlab.open_image import open_image

MAPS = {"segmentation": "seg.png", "mask": "mask.png"}
_NAMES = {"mask.png": "mask", "seg.png": "label map"}
_TURNED = (5, 6, 7, 8)  # values of the orientation tag that exchange width and height
_ORIENTATION = 0x0112
_WHITE = 128  # a mask's pixel from here on is hole


def missing_part(files: Files, parts: Iterable[str]) -> tuple[str, str] | None:
    """What a sample lacks of what a task starts from: the part, and how it is stored; None where it has all."""
    for part in sorted(parts):
        if part in MAPS and MAPS[part] not in files:
            return part, f"file KEY.{MAPS[part]}"
        if part == BOXES and part not in sample_fields(files):
            return part, f"field {part} in KEY.json"
    return None


def decode_parts(files: Files, parts: Iterable[str], size: int | None) -> dict[str, Any]:
    """segmentation (H, W), mask uint8 (1, H, W), boxes and their crop; `size`: in the centre square at that size."""
    found: dict[str, Any] = {}
    for name in sorted(parts):
        if name == "segmentation":
            found[name] = _map(files, MAPS[name], size)
        elif name == "mask":
            found[name] = (_map(files, MAPS[name], size) >= _WHITE).astype(np.uint8)[None]
        elif name == BOXES:
            fields = required_fields(files, (BOXES,))
            crop = sample_fields(files).get("crop", list(annotations.WHOLE))
            found |= {BOXES: fields[BOXES], "crop": annotations.checked_crop(crop)}
            if size is not None and (shape := _image_shape(files)):
                found |= centre_cropped(found, *shape)
    return found


def _map(files: Files, ending: str, size: int | None) -> NDArray[Any]:
    """Numbers (H, W) of a greyscale or palette image."""
    if ending not in files:
        raise KeyError(f"no file KEY.{ending}")
    opened = open_image(files[ending], ("PNG",))
    values = np.asarray(decoded(opened, lambda image: image.convert("L") if image.mode == "1" else image.copy()))
    if values.ndim != 2:
        raise ValueError(f"KEY.{ending} has several channels; store one number a pixel")
    values = values if values.dtype == np.uint8 else values.astype(np.int64)
    height, width = values.shape
    return values if size is None else annotations.nearest(values, size, annotations.centre_square(width, height))


def mirrored_sample(sample: dict[str, Any]) -> dict[str, Any]:
    """Left and right exchanged in all that lies on the image; moments have a mirrored view of their own."""
    arrays = [name for name in ("image", "segmentation", "mask") if name in sample]
    turned: dict[str, Any] = {name: np.ascontiguousarray(sample[name][..., ::-1]) for name in arrays}
    if BOXES in sample:
        turned |= {BOXES: annotations.mirrored(sample[BOXES]), "crop": annotations.mirrored_box(sample["crop"])}
    return {**sample, **turned}


def centre_cropped(fields: dict[str, Any], width: int, height: int) -> dict[str, Any]:
    """The fields with boxes relative to the image's centre square, and where that lies in the original."""
    if width == height:
        return fields
    square = annotations.centre_square(width, height)
    crop = annotations.within(square, fields.get("crop", annotations.WHOLE))
    return {**fields, BOXES: annotations.cropped(fields[BOXES], square), "crop": crop}


def boxes_following(files: Files) -> Files:
    """For an image that is about to be cropped to its centre square and left behind: boxes that follow it."""
    fields = sample_fields(files, (BOXES,))
    shape = _image_shape(files)
    if BOXES not in fields or shape is None or shape[0] == shape[1]:
        return files
    return {**files, "json": json.dumps(centre_cropped(fields, *shape), ensure_ascii=False).encode()}


def _image_shape(files: Files) -> tuple[int, int] | None:
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
    if square:
        left, top, side = annotations.middle_square(*shape)
        values, shape = values[top : top + side, left : left + side], (side, side)
    places = zip(target, shape, strict=True)
    columns, rows = (((np.arange(new) + 0.5) * old / new).astype(np.int64) for new, old in places)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values[rows[:, None], columns])).save(file, "PNG")
    return file.getvalue()


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
