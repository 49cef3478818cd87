"""Rows about images: `metadata.jsonl`, CSV and TSV, in any language."""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError

FILE_COLUMNS = ("file_name", "file", "filename", "image", "path", "image_path")
CAPTION_COLUMNS = ("caption", "text")
_ENDINGS = (".jsonl", ".csv", ".tsv")
LISTS = ("captions.txt", "labels.txt", "metadata.txt")  # tables by another ending, if they begin with a header
Row = dict[str, Any]


def find_table(source: Path) -> Path | None:
    """SOURCE itself, its `metadata.*`, or the only table beside its images."""
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


def read_table(path: Path) -> list[Row]:
    """All rows, a byte order mark left out; values of a CSV stay text, empty ones become None."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}); mend that.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8.") from None
    rows = _json_rows(path, text) if path.suffix.lower() == ".jsonl" else _csv_rows(path, text)
    if not rows:
        raise InputError(f"{path} has no rows; give a table with one row an image.")
    return rows


def _json_rows(path: Path, text: str) -> list[Row]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: captions may hold other line separators
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}, is not JSON ({error}); mend or remove the line.") from None
        if not isinstance(row, dict):
            raise InputError(f"{path}, line {number}, is not an object; write one {{...}} a line.")
        rows.append(row)
    return rows


def _csv_rows(path: Path, text: str) -> list[Row]:
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise InputError(f"{path}, line {reader.line_num}: {error}; mend or remove the line.") from None
    for number, row in enumerate(rows, 2):
        if None in row:
            raise InputError(
                f"{path}, row {number}, has more cells than its header; quote cells that hold {delimiter!r}."
            )
    return [{name: value or None for name, value in row.items()} for row in rows]


def columns(rows: list[Row]) -> list[str]:
    """Names over all rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def pick_column(rows: list[Row], wanted: str | None, usual: tuple[str, ...], option: str, where: Path) -> str:
    """The column to use, or a sentence that says which ones there are."""
    found = columns(rows)
    for name in (wanted,) if wanted else usual:
        if name in found:
            return name
    missing = wanted or " or ".join(usual)
    raise InputError(
        f"{where} has no column {missing}, it has {', '.join(found)}; name the right one with {option} NAME."
    )
