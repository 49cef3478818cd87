"""Output of `ldmlab report` and evaluate.py: the page of an evaluation, a comparison, tables for printing.

Several evaluations share one table for each measurement, with a mean over training seeds.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeVar

from ldmlab import distributed
from ldmlab.disks import disk_errors
from ldmlab.files import write_text
from ldmlab.report.evaluation_page import evaluation_page, score_lines
from ldmlab.report.line_chart import Chart
from ldmlab.report.metrics_json import (
    comparable_groups,
    folder_name,
    full_evaluations,
    measurement_line,
    read_evaluation,
    reading,
    repeat_line,
    title,
)
from ldmlab.report.page_content import DASH, THUMBNAIL, Card, Charts, Gallery, Page, Row, Section, Table
from ldmlab.report.paper_source import all_tables, known_table
from ldmlab.report.paper_table import filled_table, paper_report
from ldmlab.report.render import FORMATS, csv_text, write_pages
from ldmlab.report.score_lines import ScoreLine, options_of, score_text

IMAGES_A_RUN = 16
T = TypeVar("T")
Lines = Sequence[ScoreLine]  # of one evaluation
Column = tuple[str, str, str]  # values that may share one: name and head of the score, its options as JSON


def comparison_tables(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], scores: Sequence[Lines]
) -> list[Table]:
    """One table for each measurement; `scores`: the printed lines of each evaluation."""
    entries = list(zip(results, names, scores, strict=True))
    return [_table([entries[number] for number in group]) for group in comparable_groups(results)]


def _table(entries: Sequence[tuple[Mapping[str, Any], str, Lines]]) -> Table:
    values: list[dict[Column, str]] = [
        {(line.name, line.head, _options(line.name, result)): line.value for line in lines}
        for result, _, lines in entries
    ]
    columns = list(dict.fromkeys(column for row in values for column in row))
    rows = [
        Row("ours", name, tuple(row.get(column, DASH) for column in columns))
        for row, (_, name, _) in zip(values, entries, strict=True)
    ]
    rows += [_mean_row(seeds, columns) for seeds in _by_configuration([result for result, *_ in entries])]
    notes = [f"To repeat {name}: {repeat_line(result)}" for result, name, _ in entries]
    heads = tuple(_head(column, columns) for column in columns)
    return Table(measurement_line(entries[0][0]), heads, rows, notes)


def _options(name: str, result: Mapping[str, Any]) -> str:
    return json.dumps(options_of(name, result), sort_keys=True)


def _head(column: Column, columns: Sequence[Column]) -> str:
    """With the options in which it differs from columns of the same score."""
    _, head, options = column
    twins = [json.loads(others) for _, other, others in columns if other == head]
    own = json.loads(options).items()
    apart = [f"{name}={value}" for name, value in own if any(twin.get(name) != value for twin in twins)]
    return f"{head} ({', '.join(apart)})" if apart else head


def _by_configuration(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Evaluations with the same protocol of models that differ only in the seed of training."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        model = result["model"]
        if model.get("configuration") is not None:
            alike = [model[name] for name in ("configuration", "step", "weights")]
            key = json.dumps([alike, model.get("guiders"), result["protocol"]], sort_keys=True, default=str)
            groups.setdefault(key, []).append(result)
    several = [found for found in groups.values() if len(found) > 1]
    return [found for found in several if len({result["model"]["training_seed"] for result in found}) == len(found)]


def _mean_row(results: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Row:
    """Sample mean and sample standard deviation of the scores that every seed has."""
    cells = []
    for name, _, options in columns:
        numbers = [result["scores"][name]["value"] for result in results if name in result["scores"]]
        whole = len(numbers) == len(results) and options == _options(name, results[0])
        cells.append(score_text(name, mean(numbers), stdev(numbers)) if whole else DASH)
    group = results[0]["model"].get("group") or "runs alike"
    return Row("ours", f"{group}, mean ± deviation over {len(results)} seeds", tuple(cells))


# ---- from folders


def comparison_page(folders: Sequence[Path]) -> Page:
    """Tables, then a row of samples of each evaluation."""
    results = full_evaluations(folders)
    names = [_checked(result, title) for result in results]
    if len(set(names)) < len(names):
        names = [result["folder"] for result in results]
    sections = [Section(table.title, [table]) for table in _tables(results, names)]
    for name, result in zip(names, results, strict=True):
        cards = _checked(result, _cards)
        gallery = [Gallery(Path(result["folder"]), cards, "thumbnails", pixels=THUMBNAIL)] if cards else []
        sections.append(Section(name, gallery))
    return Page("Comparison", f"{len(results)} evaluation{'s' * (len(results) > 1)} side by side.", sections)


def _tables(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Table]:
    """The paper's tables with our rows, then all evaluations in one table for each measurement."""
    scores = [_checked(result, score_lines) for result in results]
    return [*_paper(results), *comparison_tables(results, names, scores)]


def _paper(results: Sequence[Mapping[str, Any]], table: str | None = None) -> list[Table]:
    for result in results:  # so that damage names its folder
        _checked(result, lambda one: paper_report([one], table))
    return paper_report(results, table)


def _cards(result: Mapping[str, Any]) -> list[Card]:
    samples = (result.get("images") or {}).get("samples") or []
    return [Card([(item["file"], str(item["caption"]))]) for item in samples[:IMAGES_A_RUN]]


def _checked(result: Mapping[str, Any], part: Callable[[Mapping[str, Any]], T]) -> T:
    with reading(Path(result["folder"]) / "metrics.json", "a part"):
        return part(result)


# ---- files


def write_report(folder: Path) -> Path:
    """report.html, report.md and points.csv of one evaluation folder; the path of the page."""
    result = read_evaluation(folder)
    place = Path(result["folder"])
    return write_pages(place, evaluation_page(result), place)


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    return write_pages(out, comparison_page(folders))


def printed_tables(folders: Sequence[Path], form: str, table: str | None = None) -> str:
    """The paper's tables with our rows, then all evaluations in one table; form: text | md | latex | html.

    Without folders the paper's tables as they are: `table`, or all. With `table` that table alone.
    """
    if table is not None:
        known_table(table, "--table ")
    results = full_evaluations(folders)
    if not results:
        tables = [filled_table(name) for name in ([table] if table else all_tables())]
    elif table is not None:
        tables = _paper(results, table)
    else:
        tables = _tables(results, [_checked(result, folder_name) for result in results])
    return FORMATS[form](tables)


def lengths_page(out: Path, evaluations: Mapping[float, Path]) -> None:
    """Written by the first process; every finished evaluation has pages of its own beside."""
    if distributed.rank():
        return
    results = {length: read_evaluation(folder) for length, folder in sorted(evaluations.items())}
    lines = {length: {line.name: line for line in score_lines(result)} for length, result in results.items()}
    names = list(results[min(results)]["scores"])
    values = {name: [(length, results[length]["scores"][name]["value"]) for length in lines] for name in names}
    charts = [Chart(lines[min(lines)][name].title, {"": points}, "length") for name, points in values.items()]
    rows = [Row("ours", f"{length:g}", [row[name].value for name in names]) for length, row in lines.items()]
    table = Table("", [lines[min(lines)][name].head for name in names], rows, head="length")
    lead = "Scores of one run by the length of its averaged weights, relative to the training (Karras et al. 2024)."
    with disk_errors(out):
        page = write_pages(out, Page("Lengths of averages", lead, [Section("Scores", [Charts(charts), table])]))
        cells = [[length, *(points[i][1] for points in values.values())] for i, length in enumerate(lines)]
        write_text(out / "lengths.csv", csv_text([["length", *names], *cells]))
    for length, row in lines.items():
        print(f"length {length:<6g} {'  '.join(f'{name} {row[name].value}' for name in names)}")
    print(page)
