"""Inputs as a user gives them, to fields of a batch; inputs that a model cannot read are refused.

Images, masks and label maps: see `input_images`. Boxes: a path of JSON, or a list. Whole numbers => int64 (B,).
Anything else stays a list.
"""

import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmlab.annotations import WHOLE
from ldmlab.contracts import Guider
from ldmlab.diffusion.given_image import GivenImage
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.errors import InputError
from ldmlab.files import read_text
from ldmlab.inference.input_images import IMAGES, LOOKED_AT, ON_THE_IMAGE, SMALL, given_image, on_canvas, row

Inputs = Mapping[str, Any]  # of one image, by name

TEXTS = ("caption", "negative_prompt")
OPTIONAL = {"boxes": "crop", "caption": "negative_prompt"}  # a field that may come with another
OF_ANY = ("init_image", "image", "mask")  # that any model takes: an image to start from; one with a hole
_LARGE = 1024 * 1024  # pixels; images above go through the first stage in tiles
_TILE = 512  # px
_DEFAULTS = {"crop": list(WHOLE), "negative_prompt": ""}


class ReadsInputs:
    """What a model takes: names of inputs, checks, batches on its device, and what sampling starts from."""

    diffusion: LatentDiffusion
    guiders: tuple[Guider, ...]
    image_size: tuple[int, int]

    @property
    def device(self) -> torch.device:
        return next(self.diffusion.parameters()).device

    @property
    def enlargement(self) -> int:
        """Side of a result / side of its low-resolution image."""
        factors = [getattr(c, "enlarge", 1) for _, c in self.diffusion.conditioners.items()]
        return int(self.diffusion.first_stage.downsampling) * max(factors, default=1)  # type: ignore[arg-type]

    @property
    def reads(self) -> frozenset[str]:
        """Names of the inputs: caption, class_id, ...; empty for a model without conditions."""
        names = (c.reads for _, c in self.diffusion.conditioners.items())
        return frozenset().union(*names, *(guider.reads for guider in self.guiders))  # type: ignore[arg-type]

    def started(
        self, batch: dict[str, Any], size: tuple[int, int], repeats: int | None
    ) -> tuple[tuple[int, int], dict[str, Any], GivenImage | None]:
        """Height and width that are sampled and then cut to `size`, the batch padded to them, and its start."""
        if not has_images(batch):
            return size, batch, None
        canvas, padded = on_canvas(batch, size, self.diffusion.size_step, self.enlargement)
        return canvas, padded, given_image(self.diffusion, padded, self.reads, repeats)

    def batch(self, inputs: Sequence[Inputs], first_index: int | Sequence[int]) -> dict[str, Any]:
        """Inputs as one batch; `position` is the number of the image."""
        indices = range(first_index, first_index + len(inputs)) if isinstance(first_index, int) else first_index
        position = torch.tensor(list(indices), dtype=torch.int64, device=self.device)
        return {"position": position, **batch_of(inputs, self.reads, self.device)}

    def check(self, inputs: Sequence[Inputs]) -> None:
        """Refuse inputs that this model does not take."""
        check_inputs(self.diffusion, inputs, self.enlargement)

    @staticmethod
    def chosen_tile(tile: int | None, pixels: int) -> int:
        """Tile side in px: `tile`, or 512 for images above 1024 x 1024; 0: the full image at once."""
        return (_TILE if pixels > _LARGE else 0) if tile is None else tile

    def chosen_window(self, window: int | None, size: tuple[int, int]) -> int:
        """Side of windows in px: `window`, or as trained where an image is enlarged beyond twice that; 0: at once."""
        if window is None:
            trained = min(self.image_size)
            window = trained if SMALL in self.reads and max(size) > 2 * trained else 0
        if window and "boxes" in self.reads:
            raise InputError(f"window={window} would place all boxes in every window; leave it out.")
        return window

    def lost(self, inputs: Inputs) -> list[str]:
        """The ends of captions that the model cannot read because they are too long."""
        conditioners = [c for _, c in self.diffusion.conditioners.items() if hasattr(c, "lost")]
        captions = [inputs[name] for name in TEXTS if inputs.get(name)]
        return [end for c in conditioners for text in captions if (end := c.lost(text))]  # type: ignore[operator]


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


def boxes_of(value: Any) -> Any:
    """Boxes as they are, or from a JSON file: a list of boxes, or an object with `boxes`."""
    if not isinstance(value, str | Path):
        return value
    try:
        found = json.loads(read_text(Path(value)))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"boxes={value} cannot be read as JSON ({error}); give another file.") from error
    return found.get("boxes", found) if isinstance(found, dict) else found


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
