"""Images that a test knows all about: coloured rectangles and discs with their boxes, label maps and captions."""

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

COLOURS = [(200, 60, 60), (60, 160, 80), (60, 90, 200), (220, 180, 60)]
SHAPES = ("rectangle", "disc")
CLASSES = len(COLOURS) * len(SHAPES)


class Scene:
    """One image; `segmentation` is 0 on the background and 1 + class_id on an object."""

    def __init__(self, number: int, width: int, height: int, objects: int | None = None) -> None:
        drawn = random.Random(number)
        self.image = Image.new("RGB", (width, height), (drawn.randrange(200, 256),) * 3)
        self.labels = Image.new("L", (width, height), 0)
        self.boxes: list[dict[str, Any]] = []
        for _ in range(objects if objects is not None else drawn.randint(2, 4)):
            self._draw_object(drawn, width, height)
        self.caption = f"{len(self.boxes)} objects"

    def _draw_object(self, drawn: random.Random, width: int, height: int) -> None:
        wide, high = drawn.randint(width // 4, width // 2), drawn.randint(height // 4, height // 2)
        left, top = drawn.randint(0, width - wide), drawn.randint(0, height - high)
        class_id = drawn.randrange(CLASSES)
        corners = (left, top, left + wide - 1, top + high - 1)
        for canvas, ink in ((self.image, COLOURS[class_id // len(SHAPES)]), (self.labels, class_id + 1)):
            draw = ImageDraw.Draw(canvas)
            (draw.rectangle if class_id % len(SHAPES) == 0 else draw.ellipse)(corners, fill=ink)
        box = [left / width, top / height, (left + wide) / width, (top + high) / height]
        self.boxes.append({"class_id": class_id, "box": box})

    @property
    def pixels(self) -> np.ndarray:
        """uint8 (3, H, W)."""
        return np.asarray(self.image).transpose(2, 0, 1)

    def files(self) -> dict[str, bytes]:
        """By ending, as in a shard."""
        mask = Image.new("L", self.image.size, 0)
        mask.paste(255, (0, 0, self.image.width // 2, self.image.height // 2))
        fields = {"caption": self.caption, "class_id": len(self.boxes), "boxes": self.boxes}
        images = {"png": self.image, "seg.png": self.labels, "mask.png": mask}
        return {"json": json.dumps(fields).encode(), **{ending: _png(image) for ending, image in images.items()}}


def write_scenes(
    folder: Path,
    count: int,
    size: tuple[int, int] = (24, 16),
    objects: list[int] | None = None,  # how many each image has
    per_shard: int = 3,
    without: tuple[str, ...] = (),  # fields
) -> None:
    """Shards of scenes, (width, height) `size`, with their manifest."""
    from ldmlab.data.index_tars import index_tars
    from ldmlab.data.tars import END_MARKER, tar_bytes

    folder.mkdir(parents=True, exist_ok=True)
    for first in range(0, count, per_shard):
        data = b""
        for number in range(first, min(first + per_shard, count)):
            files = Scene(number, *size, objects=objects[number] if objects else None).files()
            fields = json.loads(files["json"])
            files["json"] = json.dumps({name: value for name, value in fields.items() if name not in without}).encode()
            data += b"".join(tar_bytes(f"{number:05}.{ending}", content) for ending, content in files.items())
        (folder / f"{first // per_shard:05}.tar").write_bytes(data + END_MARKER)
    index_tars([folder], split=folder.name, origin="drawn by a test", licence="none", workers=1)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
