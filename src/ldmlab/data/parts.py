"""What a task starts from beside fields and image: label maps, masks and boxes, as stored with a sample."""

import io
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.annotations import WHOLE, centre_square, checked, cropped, mirrored, mirrored_box, nearest, within
from ldmlab.data.reader import Files
from ldmlab.data.tar_samples import image_ending, sample_fields
from ldmlab.errors import InputError

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
