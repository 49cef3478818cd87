"""A font for the labels of sheets that has the letters of the captions, whatever their script."""

import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from typing import Any

from PIL import ImageFont

UNDRAWABLE = "(caption in the PNG's text)"
_NO_LETTER = "\uffff"  # no font has it, so it is drawn as the sign of a missing letter


class SheetFont:
    """Pillow's own font, or where it lacks a letter the machine's best one (by fontconfig)."""

    def __init__(self, texts: Iterable[str], size: int) -> None:
        letters = frozenset("".join(texts)) - frozenset(" \t\n\u200d\ufe0f")
        self.font: Any = ImageFont.load_default(size)
        if _lacks(self.font, letters) and (path := _matching(letters)):
            other = ImageFont.truetype(path, size)
            if len(_lacks(other, letters)) < len(_lacks(self.font, letters)):
                self.font = other
        self._lacking = _lacks(self.font, letters)

    def label(self, text: str) -> str:
        """The text, or a note where a letter of it cannot be drawn."""
        return UNDRAWABLE if self._lacking & set(text) else text


def _lacks(font: Any, letters: frozenset[str]) -> frozenset[str]:
    missing = bytes(font.getmask(_NO_LETTER))
    return frozenset(letter for letter in letters if bytes(font.getmask(letter)) == missing)


@cache
def _matching(letters: frozenset[str]) -> str | None:
    """Path of the installed font that fontconfig holds for the best one with these letters."""
    program = shutil.which("fc-match")
    if program is None:
        return None
    wanted = " ".join(f"{ord(letter):x}" for letter in sorted(letters))
    command = [program, "--format=%{file}", f"sans:charset={wanted}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return found.stdout if found.returncode == 0 and found.stdout.endswith((".ttf", ".otf", ".ttc")) else None
