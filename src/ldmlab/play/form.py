"""What loaded models can do, and what the page sends, to inputs and settings of a model.

The page shows a control for what the models can do and for nothing else; every value that comes back is checked before
an image becomes a file.
"""

import base64
import binascii
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmlab.data.transforms import to_rgb
from ldmlab.errors import InputError
from ldmlab.files import write_atomically
from ldmlab.inference.inputs import known_fields
from ldmlab.inference.model import LoadedModel
from ldmlab.inference.sample_settings import SAMPLERS, STRENGTH, SampleSettings, parsed, variants
from ldmlab.open_image import open_image


@dataclass(frozen=True)
class Limits:
    """Bounds of one request; the person who starts the server chooses them."""

    upload_bytes: int = 10 << 20
    images: int = 8
    side: int = 1024  # px, of a result
    steps: int = 1000
    swept: int = 12  # values
    waiting: int = 16  # requests in the queue


def abilities(models: Sequence[LoadedModel], names: Sequence[str], limits: Limits, marks: str) -> dict[str, Any]:
    """What all of the models can do; InputError for two that take different inputs."""
    first = models[0]
    for other, name in zip(models[1:], names[1:], strict=True):
        if other.reads != first.reads:
            here, there = (", ".join(sorted(one.reads)) or "nothing" for one in (first, other))
            raise InputError(f"{names[0]} takes {here}, {name} takes {there}; compare models with the same inputs.")
    guided = all(_works(one, guidance_scale=2.0) for one in models)
    auto = first.resolved(SampleSettings())
    height, width = first.image_size
    return {
        "models": list(names),
        "reads": sorted(first.reads),
        "size": [height, width],
        "step": first.diffusion.size_step,
        "enlargement": first.enlargement,
        "guidance": first.diffusion.usual_guidance if guided else None,
        "samplers": ["auto", *(name for name in SAMPLERS if all(_works(one, sampler=name) for one in models))],
        "auto": {"sampler": auto.sampler, "steps": auto.steps},
        "strength": STRENGTH,
        "classes": _classes(first),
        "same_noise": len({one.diffusion.latent_shape((height, width)) for one in models}) == 1,
        "limits": {name: getattr(limits, name) for name in Limits.__dataclass_fields__},
        "marks": marks,
    }


def _works(model: LoadedModel, **settings: Any) -> bool:
    try:
        model.resolved(SampleSettings(**settings))
    except InputError:
        return False
    return True


def _classes(model: LoadedModel) -> dict[str, Any]:
    """Number and names of the classes of each input that has some."""
    found = {}
    for _, conditioner in model.diffusion.conditioners.items():
        for name in conditioner.reads & {"class_id", "boxes", "segmentation"}:  # type: ignore[operator]
            names = list(getattr(conditioner, "numbers", ()))
            found[name] = {"count": conditioner.classes, "names": names}
    return found


SETTINGS = ("steps", "guidance_scale", "sampler", "seed", "size", "strength")
_TEXTS = ("caption", "negative_prompt")
_PIXELS = 1 << 24  # of an uploaded image
_BOXES = 1000
_KEYS = {"inputs", "settings", "count", "sweep", "trajectory"}


@dataclass(frozen=True)
class Wanted:
    """One request: images of the same inputs, by every variant of the settings."""

    inputs: dict[str, Any]  # images as such, of Pillow
    count: int
    by_name: dict[str, SampleSettings]  # by the end of their files' names
    swept: str | None
    trajectory: bool


def read_form(body: Mapping[str, Any], able: Mapping[str, Any], limits: Limits) -> Wanted:
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
    if (several := str(sweep).count(",") + 1) > limits.swept:
        raise InputError(f"a sweep over {several} numbers of steps is too long; give at most {limits.swept}.")
    swept, by_name = variants(settings, None if sweep is None else f"steps={sweep}")
    if trajectory and swept:
        raise InputError("trajectory and sweep make different strips; choose one of them.")
    count = _whole("count", body.get("count"), limits.images)
    for one in by_name.values():
        _within(one, limits)
    inputs = {name: _value(name, value, able, limits) for name, value in given.items()}
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


def _value(name: str, value: Any, able: Mapping[str, Any], limits: Limits) -> Any:
    """A caption, a class number, boxes, an image or a label map."""
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
        if len(value) > _BOXES or any(isinstance(one, dict) and one.keys() != {"class_id", "box"} for one in value):
            raise InputError(f"boxes are at most {_BOXES}, each with class_id and box alone; load the page again.")
        return value
    if name == "segmentation":
        return _label_map(value, limits)
    picture = _picture(name, value, limits, (0, 0, 0) if name == "mask" else (255, 255, 255))
    factor = able["enlargement"] if name == "low_resolution" else 1
    if name != "reference" and max(picture.size) * factor > limits.side:
        raise InputError(
            f"{name} of {picture.width}x{picture.height} px (width x height) gives an image of more than "
            f"{limits.side} px a side; upload a smaller one."
        )
    return picture


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


def _label_map(value: Any, limits: Limits) -> Image.Image:
    """One class number a pixel: {height, width, data: base64 of little-endian 16-bit numbers}."""
    if not isinstance(value, dict):
        raise InputError("segmentation: there is no label map yet; paint one.")
    height, width = (_whole(f"segmentation {side}", value.get(side), limits.side) for side in ("height", "width"))
    labels = np.frombuffer(_bytes("segmentation", value.get("data"), limits), dtype="<u1")
    if labels.size != 2 * height * width:
        raise InputError("segmentation did not arrive whole; send it again.")
    return Image.fromarray(labels.view("<u2").reshape(height, width))


@contextmanager
def as_files(inputs: Mapping[str, Any], uploads: Path) -> Iterator[dict[str, Any]]:
    """Images as PNG files named after their content; those that are new go again where the images made of them fail."""
    new: list[Path] = []
    try:
        kept = {name: str(_kept(one, uploads, new)) for name, one in inputs.items() if isinstance(one, Image.Image)}
        yield {**inputs, **kept}
    except BaseException:
        for path in new:
            path.unlink(missing_ok=True)
        raise


def _kept(image: Image.Image, uploads: Path, new: list[Path]) -> Path:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    path = uploads / f"{hashlib.sha256(buffer.getvalue()).hexdigest()[:16]}.png"
    if not path.exists():
        write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getvalue()))
        new.append(path)
    return path
