"""What lies in a folder of images: the images, and tables about them (`metadata.jsonl`, CSV, TSV) in any language."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ldmlab import files
from ldmlab.data.image_parts import MAPS
from ldmlab.data.tars import IMAGE_ENDINGS
from ldmlab.errors import InputError

FILE_COLUMNS = ("file_name", "file", "filename", "image", "path", "image_path")
CAPTION_COLUMNS = ("caption", "text")
_ENDINGS = (".jsonl", ".csv", ".tsv")
LISTS = ("captions.txt", "labels.txt", "metadata.txt")  # tables by another ending, if they begin with a header
Row = dict[str, Any]


def find_table(source: Path) -> Path | None:
    """SOURCE itself, its `metadata.*`, or the only table next to its images."""
    if source.is_file():
        return source if source.suffix.lower() in _ENDINGS or _has_header(source) else None
    for ending in _ENDINGS:
        if (source / f"metadata{ending}").is_file():
            return source / f"metadata{ending}"
    for path in sorted(source.iterdir()):
        if _has_header(path):
            return path
    tables = sorted(path for path in source.iterdir() if path.suffix.lower() in _ENDINGS)
    if len(tables) > 1:
        names = ", ".join(path.name for path in tables)
        raise InputError(f"SOURCE={source} holds several tables ({names}); give the one to use as SOURCE.")
    return tables[0] if tables else None


def _has_header(path: Path) -> bool:
    """Whether a list begins with the name of a column of files."""
    if path.name.lower() not in LISTS or not path.is_file():
        return False
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        first = file.readline(10_000).strip().lower()
    return any(cell.strip('" ') in FILE_COLUMNS for cell in re.split("[,;\t]", first))


def read_text(path: Path, named: str, instead: str) -> str:
    """A text file without its byte order mark; InputError where it cannot be read or is not UTF-8."""
    try:
        return files.read_text(path, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{named} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{named} cannot be read ({(error.strerror or str(error)).lower()}); {instead}.") from None


def read_table(path: Path) -> list[Row]:
    """All rows; values of a CSV stay text, empty ones become None."""
    text = read_text(path, str(path), "fix that")
    rows = json_rows(text, str(path)) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text)
    if not rows:
        raise InputError(f"{path} has no rows; give a table with one row an image.")
    return rows


def json_rows(text: str, named: str) -> list[Row]:
    """The objects of a text with one a line; InputError about the file as `named`."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: captions may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{named}, line {number}, is not JSON ({error}); fix or remove the line.") from None
        if not isinstance(row, dict):
            raise InputError(f"{named}, line {number}, is not an object; write one {{...}} a line.")
        rows.append(row)
    return rows


def _csv_rows(path: Path, text: str) -> list[Row]:
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; fix or remove the line.") from None
    for number, row in enumerate(rows, 2):
        if None in row:
            raise InputError(
                f"{path}, row {number}, has more cells than its header; quote cells that hold {delimiter!r}."
            )
    return [{name: value or None for name, value in row.items()} for row in rows]


def pick_column(rows: list[Row], column: str | None, usual: tuple[str, ...], option: str, where: Path) -> str:
    """The column to use, or InputError with those there are."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    for name in (column,) if column else usual:
        if name in found:
            return name
    missing = column or " or ".join(usual)
    raise InputError(
        f"{where} has no column {missing}, it has {', '.join(found)}; name the right one with {option} NAME."
    )


def walk_images(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Images below `folder`, in order, with the NAME.mask.png and NAME.seg.png next to each, by ending.

    Names are relative; hidden files and folders and __MACOSX are left out, and every real folder comes once: links into
    `folder` and to what contains it are not followed. A map without image comes as an image.
    """
    seen = {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in sorted(folders) if _is_new_folder(folder, os.path.join(where, name), seen)]
        inside = os.path.relpath(where, folder)
        shown = {n for n in names if not n.startswith(".") and n.rpartition(".")[2].lower() in IMAGE_ENDINGS}
        stems = {name.rpartition(".")[0] for name in shown}
        for name in sorted(shown):
            if (ending := map_ending(name)) and name.removesuffix(f".{ending}") in stems:
                continue
            beside = {ending: f"{name.rpartition('.')[0]}.{ending}" for ending in MAPS.values()}
            placed = {e: os.path.normpath(os.path.join(inside, file)) for e, file in beside.items() if file in shown}
            yield os.path.normpath(os.path.join(inside, name)), placed


def _is_new_folder(root: Path, path: str, seen: set[str]) -> bool:
    """Whether a folder is to be entered; it is noted in `seen`."""
    name, real, top = os.path.basename(path), os.path.realpath(path), os.path.realpath(root)
    linked = os.path.islink(path) and os.path.commonpath([real, top]) in (real, top)
    if name.startswith(".") or name == "__MACOSX" or real in seen or linked:
        return False
    seen.add(real)
    return True


def map_ending(name: str) -> str | None:
    """seg.png or mask.png, if the file is such a map."""
    return next((ending for ending in MAPS.values() if name.endswith(f".{ending}")), None)
