"""Scores over the length of averaged weights: a page, a table and the values as CSV, from one evaluation a length."""

from collections.abc import Mapping
from pathlib import Path

from ldmlab import distributed
from ldmlab.disks import disk_errors
from ldmlab.files import write_text
from ldmlab.report.evaluation_page import score_lines
from ldmlab.report.line_chart import Chart
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.page_content import Charts, Page, Row, Section, Table
from ldmlab.report.render import csv_text, write_pages


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
