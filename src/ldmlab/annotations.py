"""Annotations of an image, cropped and mirrored with it: boxes of objects, and maps of numbers.

Boxes are {"class_id": int, "box": [x0, y0, x1, y1], ...} with coordinates in [0, 1] of the whole image; a crop is
such a [x0, y0, x1, y1] too. A box that a crop has cut keeps its full extent, relative to the crop, as `uncut`.
"""

from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

Box = list[float]  # [x0, y0, x1, y1]
Boxes = list[dict[str, Any]]
BOXES = "boxes"  # name of the field
WHOLE = (0.0, 0.0, 1.0, 1.0)


def checked(boxes: Any, classes: int | None = None) -> Boxes:
    """The boxes, each with a whole class_id; ValueError where one is none or its class is not below `classes`."""
    if not isinstance(boxes, list):
        raise ValueError(f"boxes are a {type(boxes).__name__}, not a list")
    found = []
    for entry in boxes:
        box = entry.get("box") if isinstance(entry, dict) else None
        if not _four_numbers(box) or "class_id" not in entry:
            raise ValueError(f'{str(entry)[:80]} is no box; write {{"class_id": 3, "box": [x0, y0, x1, y1]}}')
        if not 0 <= box[0] < box[2] <= 1 or not 0 <= box[1] < box[3] <= 1:
            raise ValueError(f"box {box} does not lie in [0, 1] with x0 < x1 and y0 < y1")
        found.append({**entry, "class_id": whole_class(entry["class_id"], classes)})
    return found


def checked_crop(crop: Any) -> Box:
    """A crop as it came; ValueError where it is none."""
    if not _four_numbers(crop) or not crop[0] < crop[2] or not crop[1] < crop[3]:
        raise ValueError(f"crop {str(crop)[:80]} is not [x0, y0, x1, y1] with x0 < x1 and y0 < y1")
    return list(crop)


def _four_numbers(box: Any) -> TypeGuard[Sequence[float]]:
    """True and false are no numbers."""
    four = isinstance(box, list | tuple) and len(box) == 4
    return four and all(isinstance(value, int | float) and not isinstance(value, bool) for value in box)


def whole_class(value: Any, classes: int | None = None) -> int:
    """A class_id: a whole number 0 .. `classes` - 1 (2^31 - 1 where unknown), also as 3.0 or "3"; else ValueError."""
    limit = 1 << 31 if classes is None else classes
    whole = isinstance(value, int) and not isinstance(value, bool)
    whole |= isinstance(value, float) and value.is_integer() and abs(value) < 1 << 31
    whole |= isinstance(value, str) and len(value) < 20 and value.strip().isascii() and value.strip().isdigit()
    if not whole or not 0 <= int(value) < limit:
        raise ValueError(f"class_id {str(value)[:40]!r} is no whole number in 0 .. {limit - 1}")
    return int(value)


def area(box: Sequence[float]) -> float:
    """Share of the image."""
    return (box[2] - box[0]) * (box[3] - box[1])


def cropped(boxes: Boxes, crop: Sequence[float]) -> Boxes:
    """Boxes relative to the crop, cut at its edges; those outside are left out."""
    left, top, right, bottom = crop
    width, height = right - left, bottom - top
    inside = []
    for entry in boxes:
        x0, y0, x1, y1 = entry["uncut"] if "uncut" in entry else entry["box"]
        whole = [(x0 - left) / width, (y0 - top) / height, (x1 - left) / width, (y1 - top) / height]
        box = [min(max(value, 0.0), 1.0) for value in whole]
        if box[0] < box[2] and box[1] < box[3]:
            kept = {name: value for name, value in entry.items() if name != "uncut"}
            inside.append({**kept, "box": box, **({"uncut": whole} if box != whole else {})})
    return inside


def mirrored(boxes: Boxes) -> Boxes:
    """Left and right exchanged."""
    sides = ("box", "uncut")
    return [{**entry, **{name: mirrored_box(entry[name]) for name in sides if name in entry}} for entry in boxes]


def mirrored_box(box: Sequence[float]) -> Box:
    """One box, or a crop."""
    return [1 - box[2], box[1], 1 - box[0], box[3]]


def middle_square(width: int, height: int) -> tuple[int, int, int]:
    """Left, top and side of the largest square in the middle of an image, px."""
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side


def centre_square(width: int, height: int) -> Box:
    """That square as a crop."""
    left, top, side = middle_square(width, height)
    return [left / width, top / height, (left + side) / width, (top + side) / height]


def within(crop: Sequence[float], outer: Sequence[float]) -> Box:
    """The crop, given relative to `outer`, relative to what `outer` is relative to."""
    width, height = outer[2] - outer[0], outer[3] - outer[1]
    left, top = outer[0], outer[1]
    return [left + crop[0] * width, top + crop[1] * height, left + crop[2] * width, top + crop[3] * height]


def nearest(values: NDArray[Any], size: int, place: Sequence[float]) -> NDArray[Any]:
    """A map of numbers (..., H, W) in the crop, at size x size: the value at the centre of each target pixel."""
    height, width = values.shape[-2:]
    steps = (np.arange(size) + 0.5) / size
    rows = np.clip(((place[1] + (place[3] - place[1]) * steps) * height).astype(np.int64), 0, height - 1)
    columns = np.clip(((place[0] + (place[2] - place[0]) * steps) * width).astype(np.int64), 0, width - 1)
    return np.ascontiguousarray(values[..., rows[:, None], columns])
