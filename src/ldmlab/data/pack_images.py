"""The workers of a pack: a part of a shard in, its tar bytes out; parts are independent of each other."""

import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ldmlab.annotations import BOXES
from ldmlab.data.decode import checked_fields, clean_fields, stored_fields
from ldmlab.data.image_parts import MAPS, centre_cropped, packed_map, upright_size
from ldmlab.data.image_sources import Item, captioned
from ldmlab.data.opt_out import OptOut
from ldmlab.data.tars import image_ending, read_range, tar_bytes
from ldmlab.data.transforms import Transform
from ldmlab.errors import InputError, one_of
from ldmlab.open_image import open_image, read_image

FORMATS = ("webp", "png", "jpg")


@dataclass(frozen=True)
class Encoding:
    """File format of packed images; webp without a quality is lossless."""

    format: str = "webp"
    quality: int | None = None  # 1 .. 100

    def __post_init__(self) -> None:
        one_of("format", self.format, FORMATS)
        if self.quality is not None and (self.format == "png" or not 1 <= self.quality <= 100):
            raise InputError(f"quality={self.quality} with format={self.format}; give 1 .. 100 to webp or jpg only.")

    def __call__(self, image: Image.Image) -> bytes:
        """RGB image => file content."""
        file = io.BytesIO()
        if self.format == "png":
            image.save(file, "PNG")
        elif self.format == "jpg":
            image.save(file, "JPEG", quality=self.quality or 95, subsampling=0)
        elif self.quality is None:  # here quality is effort: 3 x faster, 5% larger
            image.save(file, "WEBP", lossless=True, quality=50, method=2)
        else:
            image.save(file, "WEBP", quality=self.quality, method=4)
        return file.getvalue()


@dataclass(frozen=True)
class Part:
    """Encoded samples, ready to be written one after the other."""

    data: bytes
    offsets: list[int]  # of each sample within `data`
    fields: list[str]
    bad: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    small: list[str] = field(default_factory=list)  # names of images below the least side
    excluded: list[str] = field(default_factory=list)  # how each image of the opt-out list was found


def encode_part(
    items: Sequence[Item], transform: Transform, encoding: Encoding, min_side: int, exclude: OptOut | None = None
) -> Part:
    """Decodes, transforms and encodes each image; a fault in one is noted and the next one is taken."""
    data, offsets, names = bytearray(), [], dict[str, None]()
    bad, small, excluded = [], [], []
    if exclude is not None:
        exclude.entries()  # a list that was changed is no fault of an image
    for item in items:
        try:
            with warnings.catch_warnings(action="ignore"):  # Pillow warns of odd metadata and large images
                source, fields, maps = _open(item)
                image = open_image(source)
                if exclude is not None and (way := exclude.match(source, image, [*fields.values(), *item.urls])):
                    excluded.append(way)
                    continue
                if min(image.size) < min_side:
                    small.append(item.name)
                    continue
                fields = {**fields, "original_width": image.width, "original_height": image.height}
                shape = upright_size(image)
                if fields.get(BOXES) and transform.square:
                    fields = centre_cropped(fields, *shape)
                packed = transform(image)
                maps = {e: packed_map(c, e, shape, packed.size, transform.square) for e, c in maps.items()}
                content = encoding(packed)
        except (FileNotFoundError, UnidentifiedImageError) as error:
            bad.append((item.name, "is missing" if isinstance(error, FileNotFoundError) else "is not an image"))
            continue
        except Exception as error:  # whatever a decoder raises on broken bytes
            text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)  # without its path
            bad.append((item.name, text or type(error).__name__))
            continue
        offsets.append(len(data))
        names.update(dict.fromkeys(fields))
        data += tar_bytes(f"{item.key}.{encoding.format}", content)
        data += tar_bytes(f"{item.key}.json", json.dumps(fields, ensure_ascii=False).encode())
        for ending, stored in sorted(maps.items()):
            data += tar_bytes(f"{item.key}.{ending}", stored)
    return Part(bytes(data), offsets, list(names), bad, small, excluded)


def _open(item: Item) -> tuple[bytes, dict[str, Any], dict[str, bytes]]:
    """The content of the image's file, its fields, and the files of its maps by ending."""
    if item.fault:
        raise ValueError(item.fault)
    fields = clean_fields(item.fields)
    if item.span is None:
        content = read_image(Path(item.path))
        maps = {}
        for ending, path in item.maps.items():
            try:
                maps[ending] = read_image(Path(path))
            except FileNotFoundError:
                raise ValueError(f"its {Path(path).name} is missing") from None
    else:
        _, sample = read_range(item.path, *item.span)
        image = image_ending(sample)
        if image is None:
            raise ValueError("holds no image")
        content, fields = sample[image], captioned(fields or stored_fields(sample), item.caption)
        maps = {ending: sample[ending] for ending in MAPS.values() if ending in sample}
    if not content:
        raise ValueError("is empty")
    return content, checked_fields(fields), maps
