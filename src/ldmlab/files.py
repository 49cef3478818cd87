"""Files written completely or not at all.

`write_atomically`, `write_text` and `write_json` replace a file by rename after fsync, so that neither a kill nor a
power cut leaves half of one.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

from ldmlab.disks import disk_errors, open_regular


def weights_folder() -> Path:
    """Folder of fetched files: LDMLAB_WEIGHTS or ~/.cache/ldmlab."""
    return Path(os.environ.get("LDMLAB_WEIGHTS") or Path.home() / ".cache" / "ldmlab")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a temporary file in the folder of `path`, which then replaces it; on failure the old file stays."""
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            temporary.chmod(0o644)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def clear_unfinished(folder: Path, name: str | None = None) -> None:
    """Delete what a killed process left of a file or folder NAME, None: of any; nobody else may be writing it."""
    for left in folder.glob(f".{'*' if name is None else glob.escape(name)}.????????.part"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def link(path: Path, other: Path) -> None:
    """A second name for a file, or for each file of a folder; a copy where there are no hard links.

    What had that name is replaced.
    """

    def same(temporary: Path) -> None:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)

    if not path.is_dir():
        write_atomically(other, same)
        return
    for file in path.iterdir():
        link(file, beside(other) / file.name)
    put(beside(other), other)


def beside(path: Path) -> Path:
    """Where a folder that will be at `path` is filled."""
    return path.with_name(f".{path.name}.part")


def put(folder: Path, path: Path) -> None:
    """Rename a complete folder, whose files are on disk; what had that name is removed."""
    with disk_errors(path):
        remove(path)
        os.replace(folder, path)
        sync_folder(path.parent)


def remove(path: Path) -> None:
    """Delete a file or a folder, which first gets a name that nobody reads; nothing where there is none."""
    if path.is_dir():
        aside = path.with_name(f".{path.name}.removed.part")
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, written atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def write_json(path: Path, value: Any) -> None:
    """JSON with one key a line, written atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file; OSError for anything else, UnicodeDecodeError for other bytes."""
    with TextIOWrapper(BufferedReader(open_regular(path)), encoding=encoding) as file:
        return file.read()


def read_json(path: Path) -> Any:
    """The value in a small JSON file; None where the file is missing, damaged or no file, or its text is no text."""
    try:
        with open_regular(path) as file:
            value = json.loads(file.read().decode())
        json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair, which nobody could write
        return value
    except (OSError, ValueError, RecursionError):
        return None


def file_sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def encodable(text: str) -> str:
    """Half a surrogate pair, as in a damaged caption or a file's name in other bytes, as a question mark."""
    return text.encode("utf-8", "replace").decode()


def markdown_line(text: Any, special: str = r"\\`\[\]<") -> str:
    """Markdown of one line with the special characters escaped: no HTML, links or images of its own."""
    return re.sub(f"([{special}])", r"\\\1", " ".join(encodable(str(text)).split()))


def by_step(folder: Path, ending: str) -> list[Path]:
    """The files `step_<number><ending>` of a folder, the lowest number first."""
    pattern = re.compile(rf"step_(\d{{8,}}){re.escape(ending)}")
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := pattern.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power cut, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
