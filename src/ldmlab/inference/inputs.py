"""Inputs as a user gives them, to fields of a batch; inputs that a model cannot read are refused.

Images (image, init_image, low_resolution, reference): a path, a PIL image or uint8 (H, W, 3) => uint8
(B, 3, H, W), of `reference` a list of (3, H, W); what is transparent in them lies on white. Masks: a path or PIL
image, white in the hole, or (H, W), not zero in the hole, or the `TransparentParts` of an image => uint8
(B, 1, H, W). Label maps (segmentation): a path, a PIL image or (H, W) => int64 (B, H, W). Boxes: a path of JSON, or a
list. Whole numbers => int64 (B,). Anything else stays a list.
"""

import json
import operator
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldmlab.annotations import WHOLE
from ldmlab.data.transforms import to_rgb
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError
from ldmlab.files import read_text
from ldmlab.open_image import open_image

Inputs = Mapping[str, Any]  # of one image, by name

SMALL = "low_resolution"
LOOKED_AT = "reference"  # read by an image encoder, so that its size does not set the result's
IMAGES = ("image", "init_image", SMALL, LOOKED_AT, "guider_image")
ON_THE_IMAGE = ("image", "init_image", "mask", "segmentation")  # of the size of the result
TEXTS = ("caption", "negative_prompt")
OPTIONAL = {"boxes": "crop", "caption": "negative_prompt"}  # a field that may come with another
OF_ANY = ("init_image", "image", "mask")  # that any model takes: an image to start from; one with a hole
_DEFAULTS = {"crop": list(WHOLE), "negative_prompt": ""}
_WHITE = 128  # a mask's pixel in a file from here on is hole
_OPAQUE = 255


@dataclass(frozen=True)
class TransparentParts:
    """As a mask: every pixel of an image that is not opaque is hole."""

    image: str | Path

    def __str__(self) -> str:
        return f"transparent parts of {self.image}"


@dataclass(frozen=True)
class Fitted:
    """An image's largest centre crop with the aspect ratio of (height, width), resized to it."""

    image: str | Path
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.image} fitted to {self.size[0]}x{self.size[1]}"


def column(field: str, values: Sequence[Any], device: torch.device) -> Any:
    if field in IMAGES or field in ON_THE_IMAGE:
        rows = [row(field, value) for value in values]
        if field == LOOKED_AT:
            return [one.to(device) for one in rows]
        if len({tuple(one.shape) for one in rows}) > 1:
            raise InputError(f"{field}: the images of one batch differ in size; sample them one size at a time.")
        return torch.stack(rows).to(device)
    if field == "boxes":
        return [boxes_of(value) for value in values]
    if field == "class_id":
        values = [class_number(value) for value in values]
    numbers = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64, device=device) if numbers else list(values)


def class_number(value: Any) -> int:
    """A whole number, whatever its type; anything else is refused."""
    try:
        number = int(value) if isinstance(value, float) and value.is_integer() else operator.index(value)
    except TypeError:
        number = -1
    if isinstance(value, bool) or not 0 <= number < 2**63:
        raise InputError(f"class_id={value!r:.60} is not a class number; give an integer of 0 or more.")
    return number


def checked_text(field: str, value: Any) -> None:
    """Captions are text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise InputError(f"{field}={value!r:.60} is not text; give a caption in quotes.")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise InputError(f"{field}={value!r:.60} holds half of a surrogate pair; type it again.")


def row(field: str, value: Any) -> Tensor:
    """One image's entry: uint8 (3, H, W), uint8 (1, H, W) or int64 (H, W)."""
    from_file = isinstance(value, str | Path | Image.Image)
    if isinstance(value, TransparentParts):
        file, value = value.image, _decoded("mask", value.image, _transparent)
        if not value.size:
            raise InputError(f"{file} has no transparent parts to fill; erase some of it, or give a mask.")
    elif isinstance(value, Fitted):
        value = np.array(ImageOps.fit(Image.fromarray(_decoded(field, value.image)), value.size[::-1]))
    elif from_file:
        value = _decoded(field, value)
    try:
        array = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    except (TypeError, ValueError):
        raise InputError(f"{field}={value!r:.60} is neither an image nor a file of one; give a path.") from None
    if field in IMAGES:
        if array.dtype != torch.uint8 or array.ndim != 3 or array.shape[-1] != 3:
            raise InputError(f"{field} takes uint8 (H, W, 3), not {array.dtype} {tuple(array.shape)}; convert it.")
        return array.permute(2, 0, 1).contiguous()
    if array.ndim != 2:
        raise InputError(f"{field} takes one number a pixel, (H, W), not {tuple(array.shape)}; convert it.")
    if field == "segmentation":
        return array.to(torch.int64)
    return ((array >= _WHITE) if from_file else (array != 0)).to(torch.uint8)[None]


def boxes_of(value: Any) -> Any:
    """Boxes as they are, or from a JSON file: a list of boxes, or an object with `boxes`."""
    if not isinstance(value, str | Path):
        return value
    try:
        found = json.loads(read_text(Path(value)))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"boxes={value} cannot be read as JSON ({error}); give another file.") from error
    return found.get("boxes", found) if isinstance(found, dict) else found


def as_input(field: str, value: Any) -> Any:
    """The inverse of `row` for arrays of the data: images (H, W, 3), masks and label maps (H, W)."""
    if field in IMAGES:
        return value.transpose(1, 2, 0)
    return value[0] if field == "mask" else value


def _decoded(field: str, value: Any, turn: Callable[[Image.Image], np.ndarray] | None = None) -> np.ndarray:
    """The pixels of a file or a Pillow image, as its field is read or by `turn`; what cannot be read is refused."""
    try:
        image = value if isinstance(value, Image.Image) else open_image(value)
        if turn is not None:
            return turn(image)
        if field in IMAGES:
            return np.array(to_rgb(image))
        if field != "segmentation":
            return np.array(to_rgb(image, background=(0, 0, 0)).convert("L"))  # strokes on a transparent sheet: holes
        if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):  # 8 or 16 bits
            return np.array(image).astype(np.int64)
    except _UNREADABLE as error:
        raise InputError(f"{field}={value} cannot be read as an image ({error}); give another file.") from error
    raise InputError(
        f"segmentation={value} is an image of mode {image.mode}, not a map of class numbers; "
        "save it as a grey or palette PNG with one number a pixel."
    )


_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, Image.DecompressionBombError)


def _transparent(image: Image.Image) -> np.ndarray:
    """Where an image is not opaque, bool (H, W); empty for one that has no transparency at all."""
    if not image.has_transparency_data:
        return np.empty(0)
    return np.array(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3] < _OPAQUE


def has_images(batch: Mapping[str, Any]) -> bool:
    """Whether an image of the batch decides the size of the result."""
    return any(name in batch for name in (*ON_THE_IMAGE, SMALL))


def implied_size(inputs: Inputs, enlargement: int) -> tuple[int, int] | None:
    """Height and width of the result according to the images of an entry or batch; None if no input has a size."""
    sizes: dict[str, tuple[int, int]] = {}
    for name in (*ON_THE_IMAGE, SMALL):
        if name in inputs:
            value, axes = inputs[name], 3 if name == "segmentation" else 4  # of a batch
            value = value if isinstance(value, Tensor) and value.ndim == axes else row(name, value)
            factor = enlargement if name == SMALL else 1
            sizes[name] = value.shape[-2] * factor, value.shape[-1] * factor
    if len(set(sizes.values())) > 1:
        found = ", ".join(f"{name} for {height}x{width}" for name, (height, width) in sizes.items())
        raise InputError(f"the images differ in size: {found} px (height x width); resize one of them.")
    return next(iter(sizes.values()), None)


def check_size(inputs: Inputs, size: tuple[int, int], enlargement: int) -> None:
    """Refuse images that do not belong to the size that is sampled."""
    found = implied_size(inputs, enlargement)
    if found is not None and found != size:
        raise InputError(
            f"the input images are for {found[0]}x{found[1]} px (height x width), but {size[0]}x{size[1]} are "
            "sampled; resize them, give that size, or sample one size at a time."
        )


def rows_of(
    columns: Mapping[str, Sequence[Any] | Tensor], reads: frozenset[str], count: int | None
) -> list[dict[str, Any]]:
    """One dict an image from one list a field."""
    for name in columns.keys() - known_fields(reads):
        known = ", ".join(sorted(reads)) or "no inputs; give the number of images with count="
        raise InputError(f"{name}= is no setting and no input of this model, which takes {known}.")
    if not reads and not columns:
        return [{} for _ in range(1 if count is None else count)]
    for name, values in columns.items():
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise InputError(f"{name}={values!r:.60} is not a list; give one entry an image: {name}=[...].")
    lists = {name: list(values) for name, values in columns.items()}
    lists = {name: [int(v) if isinstance(v, Tensor) and v.ndim == 0 else v for v in c] for name, c in lists.items()}
    if len({len(values) for values in lists.values()}) != 1:
        raise InputError(
            f"give {', '.join(sorted(reads | columns.keys()))}, one entry an image, in lists of one length."
        )
    if count is not None and count != len(next(iter(lists.values()))):
        raise InputError(f"count={count} is not the length of the lists; leave it out.")
    rows = zip(*lists.values(), strict=True)
    return [dict(zip(lists, one, strict=True)) for one in rows]


def known_fields(reads: frozenset[str]) -> frozenset[str]:
    """All inputs that a model with the inputs `reads` accepts."""
    return reads | {OPTIONAL[name] for name in reads & OPTIONAL.keys()} | set(OF_ANY)


def batch_of(inputs: Sequence[Inputs], reads: frozenset[str], device: torch.device) -> dict[str, Any]:
    """The fields that a model reads, and those that any model takes, of all images."""
    batch: dict[str, Any] = {}
    further = {name for name in OF_ANY if any(name in one for one in inputs)}
    for field in sorted(reads | further):
        if any(field not in one for one in inputs):
            raise InputError(
                f"this model takes {', '.join(sorted(reads | further))} as input; give {field} for every image."
            )
        batch[field] = column(field, [one[field] for one in inputs], device)
        more = OPTIONAL.get(field)
        if more and any(more in one for one in inputs):
            batch[more] = [one.get(more, _DEFAULTS[more]) for one in inputs]
    return batch


def check_inputs(diffusion: LatentDiffusion, inputs: Sequence[Inputs], enlargement: int) -> None:
    """Refuse inputs of a wrong type and boxes, classes, label maps and masks that the model does not support."""
    conditioners = [c for _, c in diffusion.conditioners.items() if hasattr(c, "check")]
    read = {"boxes": boxes_of, "class_id": class_number, "segmentation": partial(row, "segmentation")}
    for one in different(inputs):
        for name in TEXTS:
            if name in one:
                checked_text(name, one[name])
        implied_size(one, enlargement)  # images that differ in size
        _check_mask(one)
        if LOOKED_AT in one:
            row(LOOKED_AT, one[LOOKED_AT])  # a file that is no image
        for conditioner in conditioners:
            names: frozenset[str] = conditioner.reads  # type: ignore[assignment]
            if names <= one.keys():
                conditioner.check({n: read[n](one[n]) if n in read else one[n] for n in names})  # type: ignore[operator]


def _check_mask(one: Inputs) -> None:
    if ("mask" in one) != ("image" in one):
        here, missing = ("mask", "image") if "mask" in one else ("image", "mask")
        raise InputError(f"{here} goes with {missing}: the image, and the hole in it; give both.")
    if "mask" in one and not row("mask", one["mask"]).any():
        name = f"mask={one['mask']}" if isinstance(one["mask"], str) else "the mask"
        raise InputError(f"{name} has no hole; paint white what is to be generated.")


def different(inputs: Sequence[Inputs]) -> Iterator[Inputs]:
    """Without repetitions, as from several images for one prompt."""
    return (one for place, one in enumerate(inputs) if place == 0 or one is not inputs[place - 1])
