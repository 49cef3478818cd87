"""Boxes with classes as a sequence of tokens through a transformer trained with the denoiser (section 4.3.2).

The encoding is that of the taming-transformers data code: three tokens an object, its class and its two corners on a
grid of floor(sqrt(vocabulary)) cells a side, empty tokens up to `objects`, then the two corners of the crop. As there,
corners are counted in the whole image if the crop has tokens (of objects that it cuts, all of them), else in the crop.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ldmlab.annotations import WHOLE, checked, within
from ldmlab.conditioners import BaseConditioner
from ldmlab.contracts import Encode
from ldmlab.errors import InputError, did_you_mean, one_of
from ldmlab.nn.attention import TransformerEncoder

_ROUNDING = 1e-6
_BITS = {"group_of": 1, "occluded": 2, "depiction": 4, "inside": 8}  # the official data code's


class LayoutTokens(BaseConditioner):
    """States of the boxes' tokens, (B, 3 objects + 2, width); the null condition is no box, in the same crop."""

    reads = frozenset({"boxes"})  # and `crop`, where there is one
    slot = "tokens"

    def __init__(
        self,
        width: int = 512,  # of the states
        depth: int = 16,  # blocks
        objects: int = 30,  # most boxes in an image
        crop_tokens: bool = True,  # two more tokens: corners of the crop in the original image
        vocab_size: int = 8192,  # tokens: classes and grid cells share them, the last is "empty"
        drop: float = 0.0,  # rate of empty layouts in training, for guidance
        heads: int = 8,  # of 64 channels each
        unused_head: bool = False,  # keep the unused output layer of the official files
        classes: int | None = None,  # of the data, numbered from 0; None: any number that is a token
        names: Sequence[str] | None = None,  # of the classes, by which boxes may name them: {"class": "dog", ...}
        attributes: Sequence[str] = (),  # of objects, in the class's token: group_of occluded depiction inside
    ) -> None:
        super().__init__(drop, width)
        self.objects, self.crop_tokens = objects, crop_tokens
        self.empty = vocab_size - 1
        if classes is not None and not 0 < classes <= self.empty:
            raise InputError(f"conditioner.classes={classes} is not 1 .. {self.empty}, the tokens of vocab_size.")
        self.classes = self.empty if classes is None else classes
        if names is not None and len(names) != classes:
            raise InputError(
                f"conditioner.names has {len(names)} names for conditioner.classes={classes}; give as many."
            )
        self.numbers = {name: number for number, name in enumerate(names or ())}
        self.attributes = _checked_attributes(attributes, classes, self.empty)
        self.cells = math.isqrt(vocab_size)  # a side of the grid
        if self.cells**2 > self.empty:
            raise InputError(f"conditioner.vocab_size={vocab_size} leaves no empty token; choose {vocab_size + 1}.")
        length = 3 * objects + 2 * crop_tokens
        self.transformer = TransformerEncoder(vocab_size, length, width, depth, heads, unused_head)

    def forward(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of the batch's boxes, in their order; positions are fractions of the crop."""
        return self._states(batch["boxes"], batch)

    def null(self, batch: dict[str, Any], encode: Encode) -> Tensor:
        """The states of no boxes; crop tokens stay, as they do not describe the content."""
        return self._states([[] for _ in batch["boxes"]], batch)

    def check(self, fields: Mapping[str, Any]) -> None:
        """Refuse one image's boxes that lie outside it, are too many or of unknown classes."""
        try:
            boxes = checked(self._numbered(fields["boxes"]))
        except ValueError as error:
            raise InputError(f"boxes: {error}; fix it.") from error
        self.tokens(boxes)

    def tokens(self, boxes: Sequence[Mapping[str, Any]], crop: Sequence[float] = WHOLE) -> list[int]:
        """Token numbers of one image."""
        if len(boxes) > self.objects:
            raise InputError(
                f"an image has {len(boxes)} boxes, more than conditioner.objects={self.objects}; give fewer."
            )
        frame = crop if self.crop_tokens else WHOLE
        whole = tuple(frame) == WHOLE
        places = [box["box"] if whole else _within(box.get("uncut", box["box"]), frame) for box in boxes]
        pairs = zip(boxes, places, strict=True)
        ids = [token for box, place in pairs for token in (self._class(box), *self._corners(place))]
        ids += [self.empty] * (3 * (self.objects - len(boxes)))
        return ids + self._corners(crop) if self.crop_tokens else ids

    def _states(self, boxes: Sequence[Sequence[Mapping[str, Any]]], batch: dict[str, Any]) -> Tensor:
        crops = batch.get("crop", [WHOLE] * len(boxes))
        ids = [self.tokens(row, crop) for row, crop in zip(boxes, crops, strict=True)]
        return self.transformer(torch.tensor(ids, device=self.transformer.tokens.weight.device))

    def _numbered(self, boxes: Any) -> Any:
        """Boxes that name their class with its number; anything else as it came."""
        if not isinstance(boxes, list):
            return boxes
        named = [isinstance(box, dict) and "class" in box and "class_id" not in box for box in boxes]
        return [{**b, "class_id": self._number(b["class"])} if one else b for b, one in zip(boxes, named, strict=True)]

    def _number(self, name: Any) -> int:
        if not isinstance(name, str) or name not in self.numbers:
            way = did_you_mean(str(name), self.numbers, "fix it." if self.numbers else "give its class_id.")
            raise InputError(
                f"boxes: class {name!r} is not one of the {len(self.numbers)} class names of this model; {way}"
            )
        return self.numbers[name]

    def _class(self, box: Mapping[str, Any]) -> int:
        number = int(box["class_id"]) if "class_id" in box else self._number(box.get("class"))
        if not 0 <= number < self.classes:
            raise InputError(f"boxes: class_id {number} is not 0 .. {self.classes - 1}; number the classes from 0.")
        return number + self.classes * sum(_BITS[name] for name in self.attributes if box.get(name))

    def _corners(self, box: Sequence[float]) -> list[int]:
        """(x0, y0, x1, y1) => the cells of the top left and the bottom right corner; rows are the slow axis."""
        if len(box) != 4 or not all(0 <= value <= 1 for value in box) or box[0] > box[2] or box[1] > box[3]:
            raise InputError(
                f"boxes: {list(box)} is no box; give x0, y0, x1, y1 in 0 .. 1, left before right, top before bottom."
            )
        last = self.cells - 1
        x0, y0, x1, y1 = (round(last * float(value)) for value in box)  # halves to even
        return [y0 * self.cells + x0, y1 * self.cells + x1]


def _within(box: Sequence[float], frame: Sequence[float]) -> list[float]:
    """A box in shares of `frame`, a part of the whole image, as shares of the whole."""
    if len(box) != 4:
        return list(box)
    moved = within(box, frame)
    return [min(max(value, 0.0), 1.0) if -_ROUNDING < value < 1 + _ROUNDING else value for value in moved]


def _checked_attributes(names: Sequence[str], classes: int | None, empty: int) -> tuple[str, ...]:
    """Attributes that have a bit, and tokens for every class with all of them."""
    for name in names:
        one_of("conditioner.attributes", name, _BITS)
    if names and (classes is None or classes * 2 * max(_BITS[name] for name in names) > empty):
        raise InputError(
            f"conditioner.attributes={','.join(names)} multiplies the tokens of conditioner.classes={classes}; give "
            f"the number of classes, and at most {empty} tokens in all (vocab_size)."
        )
    return tuple(names)
