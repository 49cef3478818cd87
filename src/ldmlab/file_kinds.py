"""What a file is that cannot be read as tensors, by its first bytes."""

import re
from pathlib import Path

from ldmlab.disks import open_regular

_KINDS = (  # first bytes of a file => what it is and what to do
    (b"version https://git-lfs", "it is a Git LFS pointer in place of the file; run `git lfs pull`"),
    (b"PK\x03\x04", "it is an archive as torch.save writes them, of which a part is missing or damaged"),
    (b"\x80", "it is a pickle"),
    (b"<", "it is a web page in place of the file; download the file itself"),
    (b"\x1f\x8b", "it is gzip-compressed; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is zstd-compressed; unpack it"),
    (b"7z\xbc\xaf", "it is a 7z archive; unpack it"),
    (b"Rar!", "it is a RAR archive; unpack it"),
    (b"\x89HDF", "it is an HDF5 file"),
    (b"GGUF", "it is a GGUF file"),
    (b"\x89PNG", "it is an image"),
    (b"\xff\xd8\xff", "it is an image"),
    (b"{", "it is a JSON text"),
    (b"\0" * 16, "it begins with zeros, as an unfinished download does"),
)


def unreadable(path: Path, error: Exception) -> str:
    """Why a file of tensors cannot be read: the kind of file recognised from its first bytes, else the error."""
    try:
        with open_regular(path) as file:
            start, size = file.read(64), path.stat().st_size
    except OSError as failed:
        return failed.strerror or str(failed)
    if not start:
        return "it is empty"
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < 100_000_000:
        cut = f"; it ends after {size} bytes, within its header" if size < 8 + header else ""
        return f"it is a safetensors file{cut}" if path.suffix != ".safetensors" else f"{first_line(error)}{cut}"
    if wanted := re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error)):  # by torch's reader of plain data
        return f"it refers to {wanted[1]}, which could run any code"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next(
        (kind for first, kind in _KINDS if text.startswith(first) or start.startswith(first)), first_line(error)
    )


def first_line(error: Exception) -> str:
    """The reason in torch's message, without its advice to load with weights_only=False."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.partition("Weights only load failed")[0].strip()[:200] or "more than plain tensors, or damaged"
