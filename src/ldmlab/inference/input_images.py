"""Input images: from files, padded to a size that the model can take, as the start of sampling, keeping a part of one.

Images (image, init_image, low_resolution, reference): a path, a PIL image or uint8 (H, W, 3) => uint8
(B, 3, H, W), of `reference` a list of (3, H, W); what is transparent in them lies on white. Masks: a path or PIL
image, white in the hole, or (H, W), not zero in the hole, or the `TransparentParts` of an image => uint8
(B, 1, H, W). Label maps (segmentation): a path, a PIL image or (H, W) => int64 (B, H, W). Sampling starts from
`init_image`; of `image` what lies outside the hole of `mask` stays, also for a model that reads neither.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ldmlab.contracts import Level, Path
from ldmlab.data.transforms import to_rgb
from ldmlab.diffusion.given_image import GivenImage, hole_of_latents, painted_over
from ldmlab.diffusion.latent_space import LatentSpace
from ldmlab.errors import InputError
from ldmlab.nn.pixels import to_float
from ldmlab.open_image import open_image

SMALL = "low_resolution"
LOOKED_AT = "reference"  # read by an image encoder, so that its size does not set the result's
IMAGES = ("image", "init_image", SMALL, LOOKED_AT, "guider_image")
ON_THE_IMAGE = ("image", "init_image", "mask", "segmentation")  # of the size of the result
_WHITE = 128  # a mask's pixel in a file from here on is hole
_OPAQUE = 255


@dataclass(frozen=True)
class TransparentParts:
    """As a mask: every pixel of an image that is not opaque is hole."""

    image: str | FilePath

    def __str__(self) -> str:
        return f"transparent parts of {self.image}"


@dataclass(frozen=True)
class Fitted:
    """An image's largest centre crop with the aspect ratio of (height, width), resized to it."""

    image: str | FilePath
    size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.image} fitted to {self.size[0]}x{self.size[1]}"


def started_at(grid: list[Level], strength: float, path: Path) -> list[Level]:
    """The levels of a grid up to that fraction of the path, and the end."""
    times = torch.tensor([level.time for level in grid[:-1]], dtype=torch.float64)
    inside = (path.position(times) <= strength + 1e-9).tolist()
    kept = [level for level, keep in zip(grid, [*inside, True], strict=True) if keep]
    if len(kept) < 2:
        raise InputError(f"strength={strength} leaves none of {len(grid) - 1} steps; raise the strength or the steps.")
    return kept


def on_canvas(
    batch: Mapping[str, Any], size: tuple[int, int], step: int, enlargement: int
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Height and width that can be sampled and hold `size`, and the batch's images, masks and maps padded to them.

    The last row and column are repeated.
    """
    unit = math.lcm(step, enlargement) if SMALL in batch else step
    canvas = math.ceil(size[0] / unit) * unit, math.ceil(size[1] / unit) * unit
    wider = dict(batch)
    for name in (*ON_THE_IMAGE, SMALL):
        if name in batch:
            values, factor = batch[name], enlargement if name == SMALL else 1
            rows, columns = (
                torch.arange(length // factor, device=values.device).clamp(max=side - 1)
                for length, side in zip(canvas, values.shape[-2:], strict=True)
            )
            wider[name] = values[..., rows[:, None], columns]
    return canvas, wider


def given_image(
    space: LatentSpace, batch: Mapping[str, Any], reads: frozenset[str], repeats: int | None
) -> GivenImage | None:
    """Start image and known part of a padded batch; a model with a mask input needs no known part."""
    source = space.encode(to_float(batch["init_image"])) if "init_image" in batch else None
    if "mask" not in batch or "mask" in reads:
        return None if source is None else GivenImage(source)
    known = space.encode(painted_over(to_float(batch["image"]), batch["mask"]))
    hole = hole_of_latents(batch["mask"], int(space.first_stage.downsampling))  # type: ignore[arg-type]
    return GivenImage(source, known, hole, repeats or 1)


def finished(images: Tensor, batch: Mapping[str, Any], size: tuple[int, int]) -> Tensor:
    """Generated uint8 (B, H, W, 3) without the padding; known pixels of uint8 `image` bit for bit."""
    images = images[:, : size[0], : size[1]]
    if "mask" not in batch or "image" not in batch:
        return images.contiguous()
    hole, image = (batch[name].cpu().permute(0, 2, 3, 1) for name in ("mask", "image"))
    return torch.where(hole != 0, images, image)


# ---- files


def row(field: str, value: Any) -> Tensor:
    """One image's entry: uint8 (3, H, W), uint8 (1, H, W) or int64 (H, W)."""
    from_file = isinstance(value, str | FilePath | Image.Image)
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
