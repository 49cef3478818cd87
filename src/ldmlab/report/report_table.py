"""Rows of ours in the paper's tables, and evaluations beside one another, ready for any format."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmlab.report.paper_columns import shown
from ldmlab.report.paper_conditions import Measured, measured
from ldmlab.report.paper_table import PaperTable, place

ARROW = {"lower": "↓", "higher": "↑", "info": ""}
DASH = "–"
_NOTHING = Measured("", {}, None, 0, 0, "", "", 0, None)  # where no row of ours is asked for


@dataclass(frozen=True)
class TableRow:
    """One line; `kind` is theirs | paper (the paper's own systems) | ours."""

    kind: str
    method: str
    cells: tuple[str, ...]
    mark: str = ""  # of the note that says why it cannot be compared


@dataclass(frozen=True)
class ReportTable:
    """Heads, lines and what stands below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...]
    lines: str = "method"  # what a line is: head of the first column


def paper_report(results: Sequence[Mapping[str, Any]], table: str | None = None) -> list[ReportTable]:
    """The tables that the evaluations' protocols name (or the one given), each with all rows of ours."""
    asked: dict[str, list[tuple[Mapping[str, Any], str | None]]] = {}
    for result in results:
        protocol = result["protocol"]
        if name := table or protocol.get("paper_table"):
            asked.setdefault(name, []).append((result, None))
        for bucket, name in (protocol.get("bucket_tables") or {}).items() if table is None else ():
            if result.get("buckets", {}).get(bucket, {}).get("scores"):
                asked.setdefault(name, []).append((result, bucket))
    return [_table(name, entries) for name, entries in asked.items()]


def bare_table(name: str) -> ReportTable:
    """A table of the paper without a row of ours."""
    return _table(name, [])


def _table(name: str, entries: Sequence[tuple[Mapping[str, Any], str | None]]) -> ReportTable:
    placed = [place(name, measured(result, bucket), _row(name, result)) for result, bucket in entries]
    first = placed[0] if placed else place(name, _NOTHING)
    rows = [
        TableRow("paper" if is_ldm else "theirs", method, tuple(values.get(c, DASH) for c in first.columns))
        for method, is_ldm, values in first.rows
    ]
    notes = [f"Source: {first.origin}", *(f"Source's note: {remark}." for remark in first.remarks)]
    for number, (one, (result, bucket)) in enumerate(zip(placed, entries, strict=True), 1):
        method = one.ours[0] if bucket is None else f"{one.ours[0]}, {bucket}"
        if one.barred:
            notes.append(f"{method} is left out: {'; '.join(one.barred)}.")
            continue
        mark = "" if one.comparable else f"†{number}"
        rows.append(TableRow("ours", method, tuple(_cell(one, column) for column in one.columns), mark))
        notes += _notes(one, method, mark, result)
    columns = tuple(f"{shown(column)} {ARROW[first.directions[column]]}".strip() for column in first.columns)
    return ReportTable(first.title, columns, tuple(rows), tuple(notes))


def _row(name: str, result: Mapping[str, Any]) -> str | None:
    """The protocol's row, in the table that it was chosen for and in the same paper's other tables that have it."""
    from ldmlab.report.paper_table import paper_tables

    row = result["protocol"].get("paper_row")
    return row if row in {entry["id"] for entry in paper_tables().get(name, {"rows": []})["rows"]} else None


def _cell(table: PaperTable, column: str) -> str:
    """Our number and how far it is from the paper's."""
    value = table.ours[1].get(column)
    delta = table.deltas.get(column)
    return DASH if value is None else value if delta is None else f"{value} ({delta})"


def _notes(table: PaperTable, method: str, mark: str, result: Mapping[str, Any]) -> list[str]:
    notes = [f"{mark} {method} cannot be compared: {'; '.join(table.reasons)}."] if mark else []
    if table.deltas:
        notes.append(f"{method}: in brackets, ours minus {table.against} of the paper.")
    return [*notes, f"To repeat {method}: {repeat_line(result)}"]


def repeat_line(result: Mapping[str, Any]) -> str:
    """Everything that decides the numbers, in one line."""
    sampling, reference, features = result["sampling"], result["reference"], result["features"]
    made = result.get("provenance", {})
    drawn = [f"{name}={value}" for name, value in sampling.items() if value is not None and name != "hardware"]
    model = [f"{name}={result['model'][name]}" for name in ("weights", "step") if name in result["model"]]
    parts = [
        f"`{made.get('command', 'command not recorded')}` at commit {made.get('commit')}",
        f"protocol {result['protocol']['name']}"
        + (f" with {', '.join(altered)}" if (altered := result["protocol"].get("changed")) else ""),
        ", ".join([*model, *drawn]),
        f"reference {reference['images']} images of {reference['split']}, {reference['image_size']} px, manifest "
        f"{str(reference.get('manifest_hash'))[:12]}",
        f"features {features['name']}, weights {features['weights_hash']}",
        f"torch {made.get('packages', {}).get('torch', 'version not recorded')}",
    ]
    return "; ".join(part for part in parts if part) + "."


# ---- evaluations beside one another


def measurement(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must be equal for scores to stand in one table; a result that names no manifest stands alone."""
    reference = result["reference"]
    known = reference.get("manifest_hash") or f"unknown, {result.get('folder', id(result))}"
    return (
        known,
        reference["image_size"],
        reference.get("task"),
        reference["split"],
        reference["images"],
        result["features"]["name"],
        result["features"]["weights_hash"],
        result["sampling"]["images"],
    )


def measurement_line(result: Mapping[str, Any]) -> str:
    """The same for people."""
    reference, features = result["reference"], result["features"]
    known = str(reference.get("manifest_hash") or "not recorded")[:12]
    return (
        f"{result['sampling']['images']:,} samples against {reference['images']:,} images of "
        f"{reference['split']}, {reference['image_size']} px, manifest {known}, features of {features['name']}"
    )


def comparable_groups(results: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Numbers of the evaluations that may share a table, in order of their first."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, result in enumerate(results):
        groups.setdefault(measurement(result), []).append(number)
    return list(groups.values())


def folder_name(result: Mapping[str, Any]) -> str:
    """Of the model."""
    return Path(str(result["model"].get("path", "model"))).name
