"""The pictures of a report: small PNG files beside metrics.json, named in it by their place."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

FOLDER = "pictures"


def save_picture(out: Path, kind: str, number: int, picture: Tensor) -> str:
    """uint8 (3, H, W) or (H, W, 3) => its path relative to `out`."""
    channels_last = picture if picture.shape[-1] == 3 else picture.permute(1, 2, 0)
    name = f"{FOLDER}/{kind}_{number:05d}.png"
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    Image.fromarray(channels_last.contiguous().numpy()).save(out / name)
    return name


def copy_pictures(out: Path, sources: Sequence[tuple[str, Path]]) -> list[dict[str, str]]:
    """Pictures made elsewhere (sweeps, strips) with their titles, copied in as they are."""
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    copied = []
    for number, (title, source) in enumerate(sources):
        name = f"{FOLDER}/extra_{number:02d}{source.suffix}"
        (out / name).write_bytes(source.read_bytes())
        copied.append({"title": title, "file": name})
    return copied
