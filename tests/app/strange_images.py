"""A stranger's folder: images of every size and mode, captions in any language, and files that are no images."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 200), "gelber": (230, 200, 30)}
SHAPES = {"circle": "ellipse", "square": "rectangle", "圆": "ellipse", "квадрат": "rectangle"}
MODES = ("RGB", "RGBA", "P", "L", "LA", "CMYK", "I;16", "1")


def make_folder(folder: Path, count: int = 64) -> None:
    """`count` readable images with captions in metadata.jsonl, two broken ones, one in another folder."""
    folder.mkdir(parents=True)
    (folder / "deep").mkdir()
    choose = random.Random(0)
    rows = []
    for number in range(count):
        colour, shape = choose.choice(list(COLOURS)), choose.choice(list(SHAPES))
        size = (choose.randint(20, 90), choose.randint(20, 90))
        name = f"deep/image.{number:03d}.png" if number % 7 == 0 else f"image {number:03d}.png"
        image = draw(size, COLOURS[colour], SHAPES[shape], MODES[number % len(MODES)])
        if number % 11 == 3:
            name = name.replace(".png", ".jpg")
            exif = Image.Exif()
            exif[0x0112] = 6  # rotated by 90 degrees
            image.convert("RGB").save(folder / name, exif=exif)
        elif number % 11 == 5:
            name = name.replace(".png", ".gif")
            image.convert("RGB").save(folder / name, save_all=True, append_images=[image.convert("RGB").rotate(90)])
        else:
            name = name.replace(".png", ".tif") if image.mode == "CMYK" else name  # PNG knows no CMYK
            image.save(folder / name)
        rows.append({"file_name": name, "caption": f"{colour} {shape}", "kind": shape})
    (folder / "empty.png").write_bytes(b"")
    (folder / "torn.jpg").write_bytes((folder / "image 001.png").read_bytes()[:60])
    rows += [{"file_name": name, "caption": "broken", "kind": "circle"} for name in ("empty.png", "torn.jpg")]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def draw(size: tuple[int, int], colour: tuple[int, int, int], shape: str, mode: str) -> Image.Image:
    """A shape on white in the given mode."""
    image = Image.new("RGBA", size, (255, 255, 255, 0 if "A" in mode else 255))
    margin = min(size) // 5
    box = (margin, margin, size[0] - margin, size[1] - margin)
    getattr(ImageDraw.Draw(image), shape)(box, fill=(*colour, 255))
    if mode == "I;16":
        return image.convert("L").convert("I").point(lambda value: value * 256).convert("I;16")
    return image if mode == "RGBA" else image.convert("RGB").convert(mode)
