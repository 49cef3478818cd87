"""Images to files: PNG with settings inside, grids with labels and titles, animations.

An image is a uint8 array (H, W, 3).
"""

import shutil
import subprocess
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ldmlab.errors import InputError
from ldmlab.open_image import open_image

UNDRAWABLE = "(caption in the PNG's text)"
_NO_LETTER = "\uffff"  # in no font, so it is rendered as the sign of a missing letter
GAP, FONT_SIZE, LABEL_LINES = 8, 13, 2  # px, px, lines under an image at most
CELL = 128  # small images are enlarged by a whole number to about this side, px
INK, PAPER = (40, 40, 40), (255, 255, 255)
FRAME_MS, LAST_FRAME_MS = 60, 1500


def save_png(path: Path, image: np.ndarray, settings: Mapping[str, Any]) -> None:
    """One image with its settings as PNG text, one entry each."""
    info = PngInfo()
    for key, value in settings.items():
        info.add_itxt(key, str(value))  # UTF-8, so captions of any language
    Image.fromarray(image).save(path, pnginfo=info)


def read_settings(path: Path) -> dict[str, str]:
    """The settings that `save_png` wrote; empty for other images."""
    with open_image(path) as image:
        image.load()
        return {key: str(value) for key, value in getattr(image, "text", {}).items()}


def grid(
    images: Sequence[np.ndarray], labels: Sequence[str] | None = None, columns: int | None = None, title: str = ""
) -> Image.Image:
    """Images of one size in rows, each with its label below; the title on top."""
    if not len(images):
        raise InputError("a grid needs at least one image.")
    columns = columns or max(round(len(images) ** 0.5), 1)
    starts = range(0, len(images), columns)
    rows = [images[i : i + columns] for i in starts]
    texts = [labels[i : i + columns] for i in starts] if labels else ()
    return _layout(rows, texts, title=title)


def table(
    rows: Sequence[Sequence[np.ndarray]], column_titles: Sequence[str], row_titles: Sequence[str] = ()
) -> Image.Image:
    """One row of images per row title, which is above it; column titles below the images."""
    return _layout(rows, [list(column_titles)] * len(rows), row_titles)


def labels_of(batch: Mapping[str, Any]) -> list[str]:
    """The caption, or else the class, of each image of a batch; empty where a batch has neither."""
    if "caption" in batch:
        return [str(caption) for caption in batch["caption"]]
    return [f"class {int(number)}" for number in batch.get("class_id", ())]


def save_animation(path: Path, images: Sequence[np.ndarray]) -> None:
    """Frames in order, the last one held; .webp or .gif, endless."""
    scale = enlargement(images[0])
    frames = [_enlarged(image, scale) for image in images]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    options: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


def enlargement(image: np.ndarray) -> int:
    """Whole factor by which an image is enlarged in grids, so that small ones can be seen."""
    sides = image.shape[:2]
    return max(round(min(CELL / min(sides), 8 * CELL / max(sides))), 1)  # a strip stays below 8 cells


def _layout(
    rows: Sequence[Sequence[np.ndarray]],
    labels: Sequence[Sequence[str]] = (),
    row_titles: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """The layout that grids and tables share."""
    scale = enlargement(rows[0][0])
    height, width = (side * scale for side in rows[0][0].shape[:2])
    lettering = LabelFont([*(text for row in labels for text in row), *row_titles, title], FONT_SIZE)
    font, line = lettering.font, FONT_SIZE + 4
    wrapped = [[wrap(lettering.label(text), width, font) for text in row] for row in labels]
    head = line + GAP if title else GAP
    above = line if row_titles else 0
    below = line * max((len(text) for row in wrapped for text in row), default=0)
    row_height = above + height + below + GAP
    columns = max(len(row) for row in rows)
    canvas = Image.new("RGB", (GAP + columns * (width + GAP), head + len(rows) * row_height), PAPER)
    draw = ImageDraw.Draw(canvas)

    def heading(text: str, top: int) -> None:
        draw.text((GAP, top), wrap(lettering.label(text), canvas.width - 2 * GAP, font, 1)[0], INK, font)

    if title:
        heading(title, GAP)
    for i, row in enumerate(rows):
        top = head + i * row_height
        if row_titles:
            heading(row_titles[i], top)
        for j, image in enumerate(row):
            left = GAP + j * (width + GAP)
            canvas.paste(_enlarged(image, scale), (left, top + above))
            for k, text in enumerate(wrapped[i][j] if wrapped else ()):
                draw.text((left, top + above + height + 2 + k * line), text, INK, font)
    return canvas


def wrap(text: str, width: int, font: Any, lines: int = LABEL_LINES) -> list[str]:
    """Words in at most `lines` lines of `width` px, dots where it is cut; at least one line."""
    done = [""]
    for word in text.split():
        longer = f"{done[-1]} {word}".strip()
        if not done[-1] or font.getlength(longer) <= width:
            done[-1] = longer
        else:
            done.append(word)
    cut = [*done[: lines - 1], " ".join(done[lines - 1 :])] if len(done) > lines else done
    return [_shortened(part, width, font) for part in cut]


def _shortened(text: str, width: int, font: Any) -> str:
    if font.getlength(text) <= width:
        return text
    fitting = bisect_left(range(len(text)), True, key=lambda end: font.getlength(f"{text[: end + 1]}...") > width)
    return f"{text[:fitting]}..."


def _enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
    image = Image.fromarray(pixels)
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


class LabelFont:
    """A font with the characters of the labels: Pillow's own, or the best match on this machine (by fontconfig)."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        letters = frozenset(_printable("".join(texts))) - frozenset(" \u200d\ufe0f")
        self.font: Any = ImageFont.load_default(size)
        if _lacks(self.font, letters) and (path := _matching(letters)):
            other = ImageFont.truetype(path, size)
            if len(_lacks(other, letters)) < len(_lacks(self.font, letters)):
                self.font = other
        self._lacking = _lacks(self.font, letters)

    def label(self, text: str) -> str:
        """The text, or a note if a character cannot be rendered; control characters are blanks."""
        return UNDRAWABLE if self._lacking & set(text) else _printable(text)


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter == "\u200d" else " " for letter in text)


def _lacks(font: Any, letters: frozenset[str]) -> frozenset[str]:
    missing = bytes(font.getmask(_NO_LETTER))
    return frozenset(letter for letter in letters if bytes(font.getmask(letter)) == missing)


@cache
def _matching(letters: frozenset[str]) -> str | None:
    """Path of the installed font that fontconfig rates best for these letters."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    codes = " ".join(f"{ord(letter):x}" for letter in sorted(letters))
    command = [program, "--format=%{file}", f"sans:charset={codes}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return found.stdout if found.returncode == 0 and found.stdout.endswith((".ttf", ".otf", ".ttc")) else None
