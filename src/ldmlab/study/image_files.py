"""Images of a study: found by name, matched between folders, copied so that no file tells its method."""

import hashlib
import io
import random
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageFilter

from ldmlab.data.tars import IMAGE_ENDINGS
from ldmlab.errors import InputError
from ldmlab.files import write_atomically
from ldmlab.inference.grids import read_settings
from ldmlab.open_image import open_image

_NOT_SAMPLES = ("grid.png",)  # that `ldmlab sample` writes beside them


def images_of(folder: Path) -> dict[str, Path]:
    """Image files by name without ending; of `ldmlab sample`, the samples alone."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give a folder of images.")
    files = [f for f in folder.iterdir() if f.suffix[1:].lower() in IMAGE_ENDINGS and not f.name.startswith(".")]
    files = sorted(f for f in files if f.name not in _NOT_SAMPLES and not f.name.startswith("sweep_"))
    found = {file.stem: file for file in files}
    if not found:
        raise InputError(f"{folder} holds no images; give another folder.")
    if len(found) < len(files):
        raise InputError(f"{folder} holds two images of one name with different endings; remove one of them.")
    return found


def matched(
    found: Mapping[str, Mapping[str, Path]], inputs: Mapping[str, Path] | None, real: str, seed: int
) -> list[dict[str, str]]:
    """For each comparison the image's name in each set: the same one, or without inputs at random if none is shared."""
    every = [set(files) for files in (*found.values(), *([inputs] if inputs is not None else []))]
    shared = sorted(set.intersection(*every))
    if shared:
        return [dict.fromkeys(found, name) for name in shared]
    if inputs is not None or real not in found:
        raise InputError(
            f"no file name is in all of the {len(every)} folders, so that images cannot be matched; name the images of "
            "one input alike."
        )
    count = min(map(len, found.values()))
    drawn = {name: random.Random(f"{seed}:{name}").sample(sorted(files), count) for name, files in found.items()}
    return [{name: names[number] for name, names in drawn.items()} for number in range(count)]


def caption_of(path: Path) -> str | None:
    """The prompt that `ldmlab sample` wrote into the file."""
    return read_settings(path).get("prompt") if path.suffix.lower() == ".png" else None


class Copies:
    """Copies of images as PNG without metadata, named by content, so that no name tells the method."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, source: Path, *, damaged: bool = False) -> str:
        try:
            with open_image(source) as image:
                pixels = image.convert("RGB")
        except (OSError, ValueError) as error:
            raise InputError(f"{source} cannot be read ({error}); repair or remove it.") from error
        if damaged:
            small = pixels.resize((6, 6), Image.Resampling.BOX).resize(pixels.size, Image.Resampling.NEAREST)
            pixels = small.filter(ImageFilter.GaussianBlur(max(pixels.size) / 40))
        buffer = io.BytesIO()
        pixels.save(buffer, "PNG")
        content = buffer.getvalue()
        name = f"{hashlib.sha256(content).hexdigest()[:24]}.png"
        if not (self.folder / name).exists():
            write_atomically(self.folder / name, lambda path: path.write_bytes(content))
        return name
