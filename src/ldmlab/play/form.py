"""What the page sends, to inputs and settings of a model: every value is checked, images are kept as files."""

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmlab.data.transforms import to_rgb
from ldmlab.errors import InputError
from ldmlab.files import write_atomically
from ldmlab.inference.inputs import known_fields
from ldmlab.inference.sample_settings import SampleSettings, parsed, variants
from ldmlab.open_image import open_image
from ldmlab.play.abilities import Limits

SETTINGS = ("steps", "guidance_scale", "sampler", "seed", "size", "strength")
PICTURES = ("low_resolution", "reference", "init_image", "image", "mask")
_TEXTS = ("caption", "negative_prompt")
_PIXELS = 1 << 24  # of an uploaded image
_KEYS = {"inputs", "settings", "count", "sweep", "trajectory"}


@dataclass(frozen=True)
class Wanted:
    """One request: images of the same inputs, by every variant of the settings."""

    inputs: dict[str, Any]
    count: int
    by_name: dict[str, SampleSettings]  # by the end of their files' names
    swept: str | None
    trajectory: bool


def read_form(body: Mapping[str, Any], able: Mapping[str, Any], limits: Limits, uploads: Path) -> Wanted:
    """The request of a page that shows `able`; InputError for anything that the page does not send."""
    given, typed = body.get("inputs"), body.get("settings")
    if body.keys() - _KEYS or not isinstance(given, dict) or not isinstance(typed, dict):
        raise InputError("the request is not one of this page; load the page again.")
    if unknown := (given.keys() - known_fields(frozenset(able["reads"]))) | (typed.keys() - set(SETTINGS)):
        raise InputError(f"{min(unknown)} is no input or setting of this model; load the page again.")
    if missing := set(able["reads"]) - given.keys():
        raise InputError(f"{', '.join(sorted(missing))}: this model needs it; fill it in.")
    settings = SampleSettings(**{name: parsed(name, str(text).strip()) for name, text in typed.items()})
    if settings.sampler not in able["samplers"]:
        raise InputError(f"sampler={settings.sampler:.40} is not one for this model; choose one of the list.")
    sweep, trajectory = body.get("sweep"), body.get("trajectory", False)
    swept, by_name = variants(settings, None if sweep is None else f"steps={sweep}")
    if trajectory and swept:
        raise InputError("trajectory and sweep make different strips; choose one of them.")
    count = _whole("count", body.get("count"), limits.images)
    if len(by_name) > limits.swept:
        raise InputError(f"a sweep over {len(by_name)} numbers of steps is too long; give at most {limits.swept}.")
    for one in by_name.values():
        _within(one, limits)
    inputs = {name: _value(name, value, able, limits, uploads) for name, value in given.items()}
    return Wanted(inputs, count, by_name, swept, bool(trajectory))


def _within(settings: SampleSettings, limits: Limits) -> None:
    sides = settings.size if isinstance(settings.size, tuple) else (settings.size or 1,)
    if max(sides) > limits.side:
        raise InputError(f"size={'x'.join(map(str, sides))} is too large here; choose at most {limits.side} px a side.")
    if (settings.steps or 1) > limits.steps:
        raise InputError(f"steps={settings.steps} are too many here; choose at most {limits.steps}.")


def _whole(name: str, value: Any, most: int) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if not 1 <= number <= most:
        raise InputError(f"{name}={value!s:.40} is not a number of 1 .. {most}; choose one of them.")
    return number


def _value(name: str, value: Any, able: Mapping[str, Any], limits: Limits, uploads: Path) -> Any:
    """A caption, a class number, boxes, or the file of an image or label map."""
    if name in _TEXTS:
        if not isinstance(value, str) or len(value) > 2000:
            raise InputError(f"{name} is not a text of at most 2,000 letters; shorten it.")
        return value
    if name == "class_id":
        try:
            return int(str(value))
        except ValueError:
            raise InputError(f"class_id={value!s:.40} is not a class number; choose a class.") from None
    if name == "boxes":
        if not isinstance(value, list) or not value:
            raise InputError("boxes: there is none yet; draw at least one with the mouse.")
        return value
    if name == "segmentation":
        return str(_label_map(value, limits, uploads))
    picture = _picture(name, value, limits, (0, 0, 0) if name == "mask" else (255, 255, 255))
    factor = able["enlargement"] if name == "low_resolution" else 1
    if name != "reference" and max(picture.size) * factor > limits.side:
        raise InputError(
            f"{name} of {picture.width}x{picture.height} px (width x height) gives an image of more than "
            f"{limits.side} px a side; upload a smaller one."
        )
    return str(_kept(picture, uploads))


def _bytes(name: str, text: Any, limits: Limits) -> bytes:
    """The content of a data URL or of base64."""
    if not isinstance(text, str):
        raise InputError(f"{name}: there is no image yet; choose a file.")
    try:
        content = base64.b64decode(text.rpartition(",")[2], validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{name} did not arrive whole; send it again.") from None
    if len(content) > limits.upload_bytes:
        size, most = len(content) / 2**20, limits.upload_bytes / 2**20
        raise InputError(f"{name} has {size:.1f} MB, more than the {most:g} MB taken here; upload a smaller file.")
    return content


def _picture(name: str, text: Any, limits: Limits, background: tuple[int, int, int]) -> Image.Image:
    content = _bytes(name, text, limits)
    try:
        image = open_image(content)
        if image.width * image.height > _PIXELS:
            raise ValueError(f"it has {image.width} x {image.height} pixels; at most {_PIXELS:,} are taken")
        return to_rgb(image, background)
    except Exception as error:  # whatever a decoder raises on broken bytes
        raise InputError(f"{name} cannot be read as an image ({error}); give another file.") from error


def _label_map(value: Any, limits: Limits, uploads: Path) -> Path:
    """One class number a pixel: {height, width, data: base64 of little-endian 16-bit numbers}."""
    if not isinstance(value, dict):
        raise InputError("segmentation: there is no label map yet; paint one.")
    height, width = (_whole(f"segmentation {side}", value.get(side), limits.side) for side in ("height", "width"))
    labels = np.frombuffer(_bytes("segmentation", value.get("data"), limits), dtype="<u1")
    if labels.size != 2 * height * width:
        raise InputError("segmentation did not arrive whole; send it again.")
    return _kept(Image.fromarray(labels.view("<u2").reshape(height, width)), uploads)


def _kept(image: Image.Image, uploads: Path) -> Path:
    """A PNG named after its content, written once."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    path = uploads / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.png"
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
    return path
