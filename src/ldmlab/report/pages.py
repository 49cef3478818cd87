"""What `ldmlab report` and evaluate.py write: the page of an evaluation, a comparison, tables for printing."""

from collections.abc import Sequence
from pathlib import Path

from ldmlab.files import write_text
from ldmlab.report.comparison import comparison_page, evaluation_tables
from ldmlab.report.evaluation_page import evaluation_page
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.paper_table import bare_table, paper_tables
from ldmlab.report.render import FORMATS, markdown, write_page


def write_report(folder: Path) -> Path:
    """report.html, report.md and points.csv of one evaluation folder; the path of the page."""
    result = read_evaluation(folder)
    place = Path(result["folder"])
    page = evaluation_page(result)
    write_text(place / "report.md", markdown(page, place))
    return write_page(place / "report.html", page)


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """One page for several evaluations, side by side."""
    page = comparison_page(folders)
    write_text(out / "report.md", markdown(page))
    return write_page(out / "report.html", page)


def printed_tables(folders: Sequence[Path], form: str, table: str | None = None) -> str:
    """The paper's tables with our rows, then the evaluations beside one another; form: text | md | latex | html.

    Without folders the paper's tables as they are: the one given, or all.
    """
    if folders:
        return FORMATS[form](evaluation_tables(folders, table))
    return FORMATS[form]([bare_table(name) for name in ([table] if table else paper_tables())])
