"""Our rows in the paper's tables, with all reasons against a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError
from ldmlab.report.metrics_json import repeat_line
from ldmlab.report.page_content import ARROW, DASH, Row, Table
from ldmlab.report.paper_source import (
    PARAMETERS,
    amount,
    barred,
    known_table,
    methods,
    reasons,
    remarks,
    source,
    source_of,
)


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


def place(name: str, result: Mapping[str, Any] | None, row: str | None = None, bucket: str | None = None) -> PaperTable:
    """The table `name` with the row of a record (None: without), compared with its row of the id `row`.

    bucket: the scores of one size of hole. Without `row` it is the paper's own where there is just one.
    """
    table = known_table(name)
    directions = {column: kind for column, kind in table["directions"].items() if not column.endswith("_std")}
    names, printed = methods(table["rows"]), [_printed(entry, list(directions)) for entry in table["rows"]]
    by_id = {entry["id"]: entry for entry in table["rows"]}
    if row is not None and row not in by_id:
        raise InputError(f"protocol.paper_row={row} is no row of {name}, which has {', '.join(by_id)}.")
    own = [entry for entry in table["rows"] if entry["is_ldm"]] if row is None else [by_id[row]]
    against = own[0] if len(own) == 1 else None
    whole = PaperTable(
        name=name,
        title=f"{table['title']} ({table['paper_table']})" if "paper_table" in table else table["title"],
        columns=tuple(directions),
        rows=tuple(zip(names, (entry["is_ldm"] for entry in table["rows"]), printed, strict=True)),
        ours=("", {}),
        reasons=(),
        origin=table["origin"],
        against=None if against is None else names[table["rows"].index(against)],
        directions=directions,
        remarks=remarks(name),
    )
    return whole if result is None else _with_ours(whole, result, against, bucket)


def _with_ours(
    table: PaperTable, result: Mapping[str, Any], against: Mapping[str, Any] | None, bucket: str | None
) -> PaperTable:
    """Our numbers with their spread and as many decimals as the most exact of the column, and theirs subtracted."""
    scores, model = result["scores"] if bucket is None else result["buckets"][bucket]["scores"], result["model"]
    values = {name: score["value"] for name, score in scores.items()}
    if bucket is None and (rate := result["sampling"].get("images_per_second")) is not None:
        values |= {"images_per_second": rate, f"sampling_{result['reference']['image_size']}_per_second": rate}
    if bucket is None and (count := model.get("parameters")) is not None:
        values |= {PARAMETERS: count, "all_parameters": count + model["first_stage_parameters"]}
    called = source_of(table.name)["our_scores"].get(table.name.split("/")[0], {})
    ours, deltas = {}, {}
    for column in table.columns:
        score = called.get(column, column)
        if (value := values.get(score)) is None:
            continue
        numbers = [word for *_, row in table.rows for word in row.get(column, "").split() if word[0].isdigit()]
        places = max((len(number.partition(".")[2]) for number in numbers), default=2)
        text = amount(value) if column == PARAMETERS else f"{value:.{places}f}"
        spread = scores.get(score, {}).get("spread")
        ours[column] = text if spread is None else f"{text} ± {spread:.{places}f}"
        if against is not None and column in against["metrics"] and column != PARAMETERS:
            deltas[column] = f"{value - against['metrics'][column]:+.{places}f}"
    method = Path(str(model.get("path", "this model"))).name
    why = reasons(table.name, result, values, against)
    return replace(table, ours=(method, ours), reasons=why, deltas=deltas, barred=barred(table.name, result))


def _printed(row: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """Values as the source prints them, with their deviation."""
    metrics, shown = row["metrics"], {}
    for column in columns:
        if column in metrics:
            usual = amount(metrics[column]) if column == PARAMETERS else str(metrics[column])
            text = str(row.get("printed", {}).get(column, usual))
            spread = metrics.get(f"{column}_std")
            shown[column] = text if spread is None else f"{text} ± {spread}"
    return shown


def paper_record(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's table with our row and the reasons against a comparison; None for a protocol without a table."""
    name = result["protocol"].get("paper_table")
    if name is None:
        return None
    table = place(name, result, result["protocol"].get("paper_row"))
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
    return [filled_table(name, entries) for name, entries in named.items()]


def filled_table(name: str, entries: Sequence[tuple[Mapping[str, Any], str | None]] = ()) -> Table:
    """A table of the paper with a row of ours for each (record, size of hole)."""
    ids = {entry["id"] for entry in known_table(name)["rows"]}  # a protocol's row may be of another of its tables
    first = place(name, None)
    rows = [
        Row("paper" if is_ldm else "theirs", method, tuple(values.get(c, DASH) for c in first.columns))
        for method, is_ldm, values in first.rows
    ]
    notes = [f"Source: {first.origin}", *(f"Source's note: {remark}." for remark in first.remarks)]
    for number, (result, bucket) in enumerate(entries, 1):
        row = result["protocol"].get("paper_row")
        one = place(name, result, row if row in ids else None, bucket)
        method = one.ours[0] if bucket is None else f"{one.ours[0]}, {bucket}"
        if one.barred:
            notes.append(f"{method} is left out: {'; '.join(one.barred)}.")
            continue
        mark = "" if one.comparable else f"†{number}"
        cells = [one.ours[1].get(c, DASH) + (f" ({one.deltas[c]})" if c in one.deltas else "") for c in one.columns]
        rows.append(Row("ours", method, tuple(cells), mark))
        notes += [f"{mark} {method} cannot be compared: {'; '.join(one.reasons)}."] if mark else []
        notes += [f"{method}: in brackets, ours minus {one.against} of the table."] if one.deltas else []
        notes.append(f"To repeat {method}: {repeat_line(result)}")
    titles = source("paper")["column_titles"] | source_of(name)["column_titles"]
    columns = tuple(f"{titles[column]} {ARROW[kind]}".strip() for column, kind in first.directions.items())
    return Table(first.title, columns, tuple(rows), tuple(notes))
