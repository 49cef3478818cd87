"""The paper's tables as data, and our row in one of them with all reasons against a comparison."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ldmlab.errors import InputError
from ldmlab.report.metrics_json import repeat_line
from ldmlab.report.paper_columns import PARAMETERS, amount, columns_of, disagreements, methods, our_name, remarks, shown
from ldmlab.report.paper_conditions import Measured, barred, measured, reasons
from ldmlab.report.rows import ARROW, DASH, Row, Table

_NOTHING = Measured("", {}, None, 0, 0, "", "", 0, None)  # for a table without a row of ours


@dataclass(frozen=True)
class PaperTable:
    """A published table with our row; `reasons` is empty when the values may be compared."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, bool, Mapping[str, str]], ...]  # method, is the paper's, printed values
    ours: tuple[str, Mapping[str, str]]
    reasons: tuple[str, ...]
    origin: str
    against: str | None = None  # method of the paper's own row that deltas count from
    deltas: Mapping[str, str] = field(default_factory=dict)  # ours - theirs, with its sign
    directions: Mapping[str, str] = field(default_factory=dict)  # lower | higher | info
    barred: tuple[str, ...] = ()  # why our row may not be in the table at all
    remarks: tuple[str, ...] = ()  # of the sources, on the table

    @property
    def comparable(self) -> bool:
        """Whether every known condition is met."""
        return not self.reasons and not self.barred


@cache
def _content() -> dict[str, Any]:
    return yaml.safe_load((files("ldmlab.report") / "paper_tables.yaml").read_text(encoding="utf-8"))


@cache
def paper_tables() -> dict[str, dict[str, Any]]:
    """All tables by name, such as text2img/coco-256."""
    return _content()["tables"] | _content()["extra"]


def known_table(name: str, option: str = "protocol.paper_table=") -> dict[str, Any]:
    """The table called `name`; `option`: how it was chosen."""
    known = paper_tables()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise InputError(f"{option}{name} is no table of the paper; {hint}")
    return known[name]


def place(name: str, ours: Measured, row: str | None = None) -> PaperTable:
    """Our row in the table `name`, compared with its row with the id `row`."""
    table = known_table(name)
    columns = columns_of(table["directions"])
    names = methods(table["rows"])
    printed = [_printed(entry, columns) for entry in table["rows"]]
    decimals = {column: _decimals(row.get(column, "") for row in printed) for column in columns}
    found = _our_values(name, decimals, ours)
    against = _row(name, table, row)
    return PaperTable(
        name=name,
        title=f"{table['title']} ({table['paper_table']})" if "paper_table" in table else table["title"],
        columns=columns,
        rows=tuple(
            (method, entry["is_ldm"], values)
            for method, entry, values in zip(names, table["rows"], printed, strict=True)
        ),
        ours=(ours.method, {column: text for column, (_, text) in found.items()}),
        reasons=reasons(name, table, ours, against),
        origin=table["origin"],
        against=None if against is None else names[table["rows"].index(against)],
        deltas={} if against is None else _deltas(found, against["metrics"], decimals),
        directions={column: table["directions"][column] for column in columns},
        barred=barred(ours),
        remarks=(*remarks(table), *disagreements(_content()["conflicts"], name)),
    )


def _decimals(values: Iterable[str]) -> int:
    """Of the most exact number of a column."""
    numbers = [word for value in values for word in value.split() if word[0].isdigit()]
    return max((len(number.partition(".")[2]) for number in numbers), default=2)


def _our_values(name: str, decimals: Mapping[str, int], ours: Measured) -> dict[str, tuple[float, str]]:
    """By column our number, and as it is printed: with its spread, and as many decimals as the table has."""
    found = {}
    for column, places in decimals.items():
        key = our_name(name, column)
        if (value := ours.values.get(key)) is not None:
            text = amount(value) if column == PARAMETERS else f"{value:.{places}f}"
            spread = ours.spreads.get(key)
            found[column] = value, text if spread is None else f"{text} ± {spread:.{places}f}"
    return found


def _row(name: str, table: Mapping[str, Any], row: str | None) -> Mapping[str, Any] | None:
    """The row with the id `row`, or the paper's own where there is just one."""
    if row is not None:
        by_id = {entry["id"]: entry for entry in table["rows"]}
        if row not in by_id:
            raise InputError(f"protocol.paper_row={row} is no row of {name}, which has {', '.join(by_id)}.")
        return by_id[row]
    own = [entry for entry in table["rows"] if entry["is_ldm"]]
    return own[0] if len(own) == 1 else None


def _deltas(
    found: Mapping[str, tuple[float, str]], theirs: Mapping[str, float], decimals: Mapping[str, int]
) -> dict[str, str]:
    return {
        column: f"{value - theirs[column]:+.{decimals[column]}f}"
        for column, (value, _) in found.items()
        if column in theirs and column != PARAMETERS
    }


def _printed(row: Mapping[str, Any], columns: tuple[str, ...]) -> dict[str, str]:
    """Values as the source prints them, with their deviation."""
    metrics, printed = row["metrics"], row.get("printed", {})
    shown = {}
    for column in columns:
        if column in metrics:
            usual = amount(metrics[column]) if column == PARAMETERS else str(metrics[column])
            text = str(printed.get(column, usual))
            spread = metrics.get(f"{column}_std")
            shown[column] = text if spread is None else f"{text} ± {spread}"
    return shown


def paper_record(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's table with our row and the reasons against a comparison; None for a protocol without a table."""
    name = result["protocol"].get("paper_table")
    if name is None:
        return None
    table = place(name, measured(result), result["protocol"].get("paper_row"))
    return asdict(table) | {"comparable": table.comparable}


# ---- for the report


def paper_report(results: Sequence[Mapping[str, Any]], table: str | None = None) -> list[Table]:
    """The tables that the evaluations' protocols name (or `table` alone), each with all rows of ours."""
    named: dict[str, list[tuple[Mapping[str, Any], str | None]]] = {}
    for result in results:
        protocol = result["protocol"]
        if name := table or protocol.get("paper_table"):
            named.setdefault(name, []).append((result, None))
        for bucket, name in (protocol.get("bucket_tables") or {}).items() if table is None else ():
            if result.get("buckets", {}).get(bucket, {}).get("scores"):
                named.setdefault(name, []).append((result, bucket))
    return [_table(name, entries) for name, entries in named.items()]


def bare_table(name: str) -> Table:
    """A table of the paper without a row of ours."""
    return _table(name, [])


def _table(name: str, entries: Sequence[tuple[Mapping[str, Any], str | None]]) -> Table:
    placed = [place(name, measured(result, bucket), _row_of(name, result)) for result, bucket in entries]
    first = placed[0] if placed else place(name, _NOTHING)
    rows = [
        Row("paper" if is_ldm else "theirs", method, tuple(values.get(c, DASH) for c in first.columns))
        for method, is_ldm, values in first.rows
    ]
    notes = [f"Source: {first.origin}", *(f"Source's note: {remark}." for remark in first.remarks)]
    for number, (one, (result, bucket)) in enumerate(zip(placed, entries, strict=True), 1):
        method = one.ours[0] if bucket is None else f"{one.ours[0]}, {bucket}"
        if one.barred:
            notes.append(f"{method} is left out: {'; '.join(one.barred)}.")
            continue
        mark = "" if one.comparable else f"†{number}"
        rows.append(Row("ours", method, tuple(_cell(one, column) for column in one.columns), mark))
        notes += _notes(one, method, mark, result)
    columns = tuple(f"{shown(column)} {ARROW[first.directions[column]]}".strip() for column in first.columns)
    return Table(first.title, columns, tuple(rows), tuple(notes))


def _row_of(name: str, result: Mapping[str, Any]) -> str | None:
    """The protocol's row, in the table that it was chosen for and in the same paper's other tables that have it."""
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
