"""Opening of untrusted images: formats that Pillow decodes itself, and bounded sizes.

Other formats of Pillow start programs (PostScript runs Ghostscript), whatever the file's extension.
"""

import io
import os
import warnings
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from ldmlab.disks import open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_PIXELS = 178_956_970  # 2^29 / 3: half a gigabyte as RGB
MAX_BYTES = 1 << 28


def open_image(source: bytes | Path | str | IO[bytes], formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The image of a file or of its bytes, not yet decoded; OSError or ValueError where it cannot be one."""
    if not isinstance(source, bytes):
        source = read_image(Path(source)) if isinstance(source, str | Path) else source.read(MAX_BYTES)
    Image.init()
    supported = [name for name in formats if name in Image.OPEN]  # by this build of Pillow
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of large images and odd metadata
        try:
            image = Image.open(io.BytesIO(source), formats=supported)
        except UnidentifiedImageError:
            raise UnidentifiedImageError(f"no image in a format that is read: {', '.join(formats)}") from None
        except (OSError, ValueError):
            raise
        except Exception as error:  # whatever a decoder raises on broken bytes, too many pixels included
            raise ValueError(str(error) or type(error).__name__) from error
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are read")
    return image


def read_image(path: Path) -> bytes:
    """The content of a file of bounded size; OSError or ValueError where it cannot be had."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_BYTES:
            raise ValueError(f"has {size} bytes; at most {MAX_BYTES} are read")
        return file.read()
