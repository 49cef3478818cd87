"""What a request tells a model, as an image for people: boxes, a label map, a small image, an image with a hole."""

import colorsys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

_GREY = 128  # of a hole
_GROUND = (244, 244, 244)


def request_image(request: Mapping[str, Any], size: int) -> Tensor | None:
    """uint8 (3, H, W); None where there is nothing to see."""
    if "mask" in request and "image" in request:
        known = np.where(np.asarray(request["mask"])[..., None] > 0, _GREY, np.asarray(request["image"]))
        return _tensor(known.astype(np.uint8))
    if "low_resolution" in request:
        small = Image.fromarray(np.asarray(request["low_resolution"]))
        return _tensor(np.asarray(small.resize((size, size), Image.Resampling.NEAREST)))
    if "reference" in request:
        looked_at = Image.fromarray(np.asarray(request["reference"]))
        return _tensor(np.asarray(ImageOps.fit(looked_at, (size, size))))
    if "boxes" in request:
        return _tensor(np.asarray(_boxes(request["boxes"], size)))
    if "segmentation" in request:
        labels = np.asarray(request["segmentation"])
        colours = np.array([_GROUND, *(colour(number) for number in range(int(labels.max(initial=0))))], np.uint8)
        return _tensor(colours[labels])
    return None


def colour(class_id: int) -> tuple[int, int, int]:
    """Of a class; neighbours differ most."""
    red, green, blue = colorsys.hls_to_rgb(class_id * 0.61803 % 1, 0.45 + 0.1 * (class_id % 3), 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _boxes(boxes: Any, size: int) -> Image.Image:
    """Each box framed and lightly filled in its class's colour."""
    canvas = Image.new("RGB", (size, size), _GROUND)
    draw = ImageDraw.Draw(canvas, "RGBA")
    for entry in boxes:
        corners = [edge * (size - 1) for edge in entry["box"]]
        ink = colour(entry["class_id"])
        draw.rectangle(corners, fill=(*ink, 70), outline=(*ink, 255))
    return canvas


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
