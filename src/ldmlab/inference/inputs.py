"""What is asked for, as people hold it, to what a batch holds.

Images (image, init_image, low_resolution, reference): a path, a PIL image or uint8 (H, W, 3) => uint8
(B, 3, H, W), of `reference` a list of (3, H, W); what is transparent in them lies on white. Masks: a path or PIL
image, white in the hole, or (H, W), not zero in the hole, or the `TransparentParts` of an image => uint8
(B, 1, H, W). Label maps (segmentation): a path, a PIL image or (H, W) => int64 (B, H, W). Boxes: a path of JSON, or a
list. Whole numbers => int64 (B,). Anything else stays a list.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

SMALL = "low_resolution"
LOOKED_AT = "reference"  # by an image encoder, so that its size says nothing of the result's
IMAGES = ("image", "init_image", SMALL, LOOKED_AT)
ON_THE_IMAGE = ("image", "init_image", "mask", "segmentation")  # of the size of the result
OPTIONAL = {"boxes": "crop", "caption": "negative_prompt"}  # a field that may come with another
GIVEN = ("init_image", "image", "mask")  # that any model takes: an image to start from; one with a hole
_UNSAID = {"crop": list(WHOLE), "negative_prompt": ""}
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
    """An image's largest middle part of the proportions of (height, width), resized to it."""

    image: str | Path
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.image} fitted to {self.size[0]}x{self.size[1]}"


def column(field: str, values: Sequence[Any], device: torch.device) -> Any:
    """One field of a batch."""
    if field in IMAGES or field in ON_THE_IMAGE:
        rows = [row(field, value) for value in values]
        if field == LOOKED_AT:
            return [one.to(device) for one in rows]
        if len({tuple(one.shape) for one in rows}) > 1:
            raise InputError(f"{field}: the images of one batch differ in size; sample them one size at a time.")
        return torch.stack(rows).to(device)
    if field == "boxes":
        return [boxes_of(value) for value in values]
    numbers = all(isinstance(value, int) for value in values)
    return torch.tensor(values, dtype=torch.int64, device=device) if numbers else list(values)


def row(field: str, value: Any) -> Tensor:
    """One image's entry: uint8 (3, H, W), uint8 (1, H, W) or int64 (H, W)."""
    from_file = isinstance(value, str | Path | Image.Image)
    if isinstance(value, TransparentParts):
        value = _transparent(value)
    elif isinstance(value, Fitted):
        value = np.array(ImageOps.fit(Image.fromarray(_decoded(field, value.image)), value.size[::-1]))
    elif from_file:
        value = _decoded(field, value)
    array = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
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
        found = json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"boxes={value} cannot be read as JSON ({error}); give another file.") from error
    return found.get("boxes", found) if isinstance(found, dict) else found


def as_asked(field: str, value: Any) -> Any:
    """The inverse of `row` for arrays of the data: images (H, W, 3), masks and label maps (H, W)."""
    if field in IMAGES:
        return value.transpose(1, 2, 0)
    return value[0] if field == "mask" else value


def _decoded(field: str, value: Any) -> np.ndarray:
    image = _opened(field, value)
    try:
        if field in IMAGES:
            return np.array(to_rgb(image))
        if field == "segmentation":
            return _numbers(value, image)
        return np.array(to_rgb(image, background=(0, 0, 0)).convert("L"))  # strokes on a transparent sheet are holes
    except (OSError, ValueError) as error:
        raise _unreadable(field, value, error) from error


def _opened(field: str, value: Any) -> Image.Image:
    try:
        return value if isinstance(value, Image.Image) else Image.open(value)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(field, value, error) from error


def _unreadable(field: str, value: Any, error: Exception) -> InputError:
    return InputError(f"{field}={value} cannot be read as an image ({error}); give another file.")


def _numbers(value: Any, image: Image.Image) -> np.ndarray:
    """The class numbers of a grey or palette image, 8 or 16 bits."""
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise InputError(
            f"segmentation={value} is an image of mode {image.mode}, not a map of class numbers; "
            "save it as a grey or palette PNG with one number a pixel."
        )
    return np.array(image).astype(np.int64)


def _transparent(value: TransparentParts) -> np.ndarray:
    image = _opened("mask", value.image)
    if not image.has_transparency_data:
        raise InputError(f"{value.image} has no transparent parts to fill; erase some of it, or give a mask.")
    return np.array(ImageOps.exif_transpose(image).convert("RGBA"))[..., 3] < _OPAQUE


def implied_size(fields: Mapping[str, Any], enlargement: int) -> tuple[int, int] | None:
    """Height and width of the result that rows or columns of fields ask for; None where nothing in them has a size."""
    sizes = {name: _size(name, fields[name], enlargement) for name in (*ON_THE_IMAGE, SMALL) if name in fields}
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{name} for {height}x{width}" for name, (height, width) in sizes.items())
        raise InputError(f"the fields do not fit each other: {told} px (height x width); resize one of them.")
    return next(iter(sizes.values()), None)


def _size(field: str, value: Any, enlargement: int) -> tuple[int, int]:
    column_axes = 3 if field == "segmentation" else 4
    value = value if isinstance(value, Tensor) and value.ndim == column_axes else row(field, value)
    factor = enlargement if field == SMALL else 1
    return value.shape[-2] * factor, value.shape[-1] * factor


def check_size(fields: Mapping[str, Any], size: tuple[int, int], enlargement: int) -> None:
    """Refuse images that do not belong to the size that is sampled."""
    found = implied_size(fields, enlargement)
    if found not in (None, size):
        assert found is not None
        raise InputError(
            f"the images given ask for {found[0]}x{found[1]} px (height x width), but {size[0]}x{size[1]} are "
            "sampled; resize them, give that size, or sample one size at a time."
        )


def rows_of(
    fields: Mapping[str, Sequence[Any] | Tensor], reads: frozenset[str], count: int | None
) -> list[dict[str, Any]]:
    """One dict an image from one list a field."""
    for name in fields.keys() - known_fields(reads):
        known = ", ".join(sorted(reads)) or "no conditions; say how many images with count="
        raise InputError(f"{name}= means nothing to this model, which takes {known}.")
    if not reads and not fields:
        return [{} for _ in range(1 if count is None else count)]
    columns = {name: list(value) for name, value in fields.items()}
    columns = {name: [int(v) if isinstance(v, Tensor) and v.ndim == 0 else v for v in c] for name, c in columns.items()}
    if len({len(values) for values in columns.values()}) != 1:
        raise InputError(
            f"give {', '.join(sorted(reads | fields.keys()))}, one entry an image, in lists of one length."
        )
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, one, strict=True)) for one in rows]


def known_fields(reads: frozenset[str]) -> frozenset[str]:
    """What a request to a model that reads `reads` may hold."""
    return reads | {OPTIONAL[name] for name in reads & OPTIONAL.keys()} | set(GIVEN)


def batch_of(requests: Sequence[Mapping[str, Any]], reads: frozenset[str], device: torch.device) -> dict[str, Any]:
    """The fields that a model reads, of all requests, and the images that they bring along."""
    batch: dict[str, Any] = {}
    brought = {name for name in GIVEN if any(name in request for request in requests)}
    for field in sorted(reads | brought):
        if any(field not in request for request in requests):
            raise InputError(
                f"this model is told {', '.join(sorted(reads | brought)) or 'nothing'}; give {field} for every image."
            )
        batch[field] = column(field, [request[field] for request in requests], device)
        more = OPTIONAL.get(field)
        if more and any(more in request for request in requests):
            batch[more] = [request.get(more, _UNSAID[more]) for request in requests]
    return batch


def check_requests(diffusion: LatentDiffusion, requests: Sequence[Mapping[str, Any]], enlargement: int) -> None:
    """Boxes, classes, label maps and masks that mean nothing to the model; the first one found is named."""
    conditioners = [c for _, c in diffusion.conditioners.items() if hasattr(c, "check")]
    for request in _different(requests):
        implied_size(request, enlargement)  # images that do not fit each other
        _check_mask(request)
        if LOOKED_AT in request:
            row(LOOKED_AT, request[LOOKED_AT])  # a file that is no image
        for conditioner in conditioners:
            if conditioner.reads <= request.keys():  # type: ignore[operator]
                conditioner.check({name: _as_read(name, request[name]) for name in conditioner.reads})  # type: ignore


def _as_read(name: str, value: Any) -> Any:
    if name == "boxes":
        return boxes_of(value)
    return row(name, value) if name == "segmentation" else value


def _check_mask(request: Mapping[str, Any]) -> None:
    if ("mask" in request) != ("image" in request):
        given, missing = ("mask", "image") if "mask" in request else ("image", "mask")
        raise InputError(f"{given} goes with {missing}: the image, and the hole in it; give both.")
    if "mask" in request and not row("mask", request["mask"]).any():
        told = f"mask={request['mask']}" if isinstance(request["mask"], str) else "the mask"
        raise InputError(f"{told} has no hole; paint white what is to be made anew.")


def _different(requests: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Without the repetitions that several images for one prompt make."""
    last: Mapping[str, Any] | None = None
    for request in requests:
        if request is not last:
            yield request
        last = request


def lost(diffusion: LatentDiffusion, request: Mapping[str, Any]) -> list[str]:
    """The ends of its captions that the model cannot read because they are too long."""
    conditioners = [c for _, c in diffusion.conditioners.items() if hasattr(c, "lost")]
    captions = [request[name] for name in ("caption", "negative_prompt") if request.get(name)]
    ends = [c.lost(caption) for c in conditioners for caption in captions]  # type: ignore[operator]
    return [end for end in ends if end]


def warn_of_lost(diffusion: LatentDiffusion, requests: Sequence[Mapping[str, Any]]) -> None:
    """A warning for every caption of which the model sees the beginning only."""
    for request in _different(requests):
        for end in lost(diffusion, request):
            warnings.warn(f'the model does not see the end of a caption that is too long: "{end}"', stacklevel=3)
