"""Images in folders, and the maps that lie beside them."""

import os
from collections.abc import Iterator
from pathlib import Path

from ldmlab.data.parts import MAPS
from ldmlab.data.tar_samples import IMAGE_ENDINGS


def walk_images(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Images below `folder`, in order, with the NAME.mask.png and NAME.seg.png beside each, by ending.

    Names are relative; hidden files and folders are left out. A map without image comes as an image.
    """
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inside = os.path.relpath(where, folder)
        shown = [n for n in files if not n.startswith(".") and n.rpartition(".")[2].lower() in IMAGE_ENDINGS]
        stems, present = {name.rpartition(".")[0] for name in shown}, set(shown)
        for name in sorted(shown):
            if (ending := map_ending(name)) and name.removesuffix(f".{ending}") in stems:
                continue
            stem = name.rpartition(".")[0]
            beside = {ending: f"{stem}.{ending}" for ending in MAPS.values() if f"{stem}.{ending}" in present}
            placed = {ending: os.path.normpath(os.path.join(inside, file)) for ending, file in beside.items()}
            yield os.path.normpath(os.path.join(inside, name)), placed


def map_ending(name: str) -> str | None:
    """seg.png or mask.png, if the file is such a map."""
    return next((ending for ending in MAPS.values() if name.endswith(f".{ending}")), None)
