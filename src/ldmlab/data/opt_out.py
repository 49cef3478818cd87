"""Opt-out lists: images that `pack` leaves out, by URL, by SHA-256 of the file, or by perceptual hash."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldmlab.data.duplicates import NEAR_BITS, Hashes, perceptual_hash
from ldmlab.data.manifest import file_sha256
from ldmlab.errors import InputError, shown
from ldmlab.files import read_text

WAYS = ("url", "sha256", "perceptual hash")


@dataclass(frozen=True)
class OptOut:
    """A list as an option; workers read it once each."""

    path: str
    sha256: str  # of the list
    distance: int = NEAR_BITS  # bits in which a perceptual hash of the list may differ

    @classmethod
    def of(cls, path: Path, distance: int = NEAR_BITS) -> "OptOut":
        """InputError for a line that is none of the three."""
        if not 0 <= distance <= 16:
            raise InputError(f"--exclude-distance {distance} must be in 0 .. 16 of 64 bits; 3 is usual.")
        try:
            listed = cls(str(path), file_sha256(path), distance)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"--exclude {path} cannot be read ({reason}); give a text file.") from None
        if not listed.entries():
            raise InputError(f"--exclude {path} lists nothing; write a URL or a hash a line, or leave the option out.")
        return listed

    def entries(self) -> int:
        known = _read(self.path)
        return len(known.urls) + len(known.sums) + len(known.hashes)

    def record(self, found: Mapping[str, int]) -> dict[str, Any]:
        """For the manifest; found: images left out by each of WAYS."""
        about = {"list": Path(self.path).name, "sha256": self.sha256, "distance": self.distance}
        return {**about, "entries": self.entries(), "left_out": {way: found.get(way, 0) for way in WAYS}}

    def match(self, content: bytes, image: Image.Image, fields: Mapping[str, Any]) -> str | None:
        """The way of WAYS by which an image is listed; content: of its file."""
        known = _read(self.path)
        if known.urls and any(value in known.urls for value in fields.values() if isinstance(value, str)):
            return WAYS[0]
        if known.sums and hashlib.sha256(content).hexdigest() in known.sums:
            return WAYS[1]
        if len(known.hashes):
            apart = np.bitwise_count(known.hashes ^ np.uint64(perceptual_hash(image.convert("RGB"))))
            if int(apart.min()) <= self.distance:
                return WAYS[2]
        return None


@dataclass(frozen=True)
class _Lines:
    urls: set[str] = field(default_factory=set)
    sums: set[str] = field(default_factory=set)
    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))


@cache
def _read(path: str) -> _Lines:
    urls, sums, hashes = set(), set(), set()
    try:
        lines = read_text(Path(path), "utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--exclude {path} is no text in UTF-8; write a URL or a hash a line.") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if re.match(r"\w+://", text):
            urls.add(text)
        elif re.fullmatch(r"[0-9a-fA-F]{64}", text):
            sums.add(text.lower())
        elif re.fullmatch(r"[0-9a-fA-F]{16}", text):
            hashes.add(int(text, 16))
        elif text and not text.startswith("#"):
            raise InputError(
                f"--exclude {path}: line {number} ({shown(text)}) is no URL (https://...), no SHA-256 of a file (64 "
                "hexadecimal digits) and no perceptual hash (16 digits); correct it, or begin a comment with #."
            )
    return _Lines(urls, sums, np.array(sorted(hashes), np.uint64))
