"""Images inside a page: as they are, or small ones where many runs share it."""

import base64
import io
from html import escape
from pathlib import Path

from PIL import Image

THUMBNAIL = 96  # px, of the longer side
_QUALITY = 70  # of WebP


def image_tag(folder: Path, name: str, title: str = "") -> str:
    """The file itself."""
    kind = {".webp": "webp", ".gif": "gif", ".jpg": "jpeg"}.get(Path(name).suffix, "png")
    return _tag(kind, (folder / name).read_bytes(), title)


def thumbnail_tag(folder: Path, name: str, title: str = "") -> str:
    """A few kilobytes: 40 runs of 16 images stay far below 5 MB."""
    content = io.BytesIO()
    with Image.open(folder / name) as image:
        small = image.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        small.save(content, "WEBP", quality=_QUALITY)
    return _tag("webp", content.getvalue(), title)


def _tag(kind: str, data: bytes, title: str) -> str:
    text = escape(title)
    return f'<img alt="{text}" title="{text}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
