"""A table for a terminal, for Markdown, for LaTeX and as a page."""

import re
from collections.abc import Callable, Sequence
from html import escape

from ldmlab.report.report_table import ReportTable, TableRow

_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "±": r"$\pm$", "–": "--", "†": r"$\dagger$"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}


def as_text(tables: Sequence[ReportTable]) -> str:
    """Aligned columns; our rows begin with >, the paper's own with *."""
    return "\n\n".join(map(_text, tables)) + "\n"


def _text(table: ReportTable) -> str:
    lead = {"ours": "> ", "paper": "* ", "theirs": "  "}
    lines = [(f"  {table.lines}", *table.columns)]
    lines += [(lead[row.kind] + _marked(row), *row.cells) for row in table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    printed = [
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in _placed(line, widths))
        for line in lines
    ]
    rule = "-" * max(map(len, printed))
    return "\n".join(
        [table.title, rule, printed[0].rstrip(), rule, *(p.rstrip() for p in printed[1:]), rule, *table.notes]
    )


def _placed(line: Sequence[str], widths: Sequence[int]) -> list[tuple[int, tuple[str, int]]]:
    return list(enumerate(zip(line, widths, strict=True)))


def _marked(row: TableRow) -> str:
    return f"{row.method} {row.mark}".strip()


def as_markdown(tables: Sequence[ReportTable]) -> str:
    """Our rows in bold."""
    return "\n".join(map(_markdown, tables))


def _markdown(table: ReportTable) -> str:
    lines = [f"### {table.title}", ""]
    lines += [f"| {table.lines} | {' | '.join(table.columns)} |", "|---" + "|---:" * len(table.columns) + "|"]
    for row in table.rows:
        method = _cell_of_markdown(_marked(row))
        shown = f"**{method}**" if row.kind == "ours" else method
        lines.append(f"| {shown} | {' | '.join(map(_cell_of_markdown, row.cells))} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)]) + "\n"


def _cell_of_markdown(text: str) -> str:
    return text.replace("|", "\\|")


def as_latex(tables: Sequence[ReportTable]) -> str:
    """`table` environments for booktabs, the notes as comments."""
    return "\n".join(map(_latex, tables))


def _latex(table: ReportTable) -> str:
    lines = [r"\begin{table}", r"\centering", f"\\caption{{{latex(table.title)}}}"]
    lines += [f"\\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & ".join([latex(table.lines), *map(latex, table.columns)]) + r" \\", r"\midrule"]
    first = next((row for row in table.rows if row.kind == "ours"), None)
    for row in table.rows:
        if row is first and row is not table.rows[0]:
            lines.append(r"\midrule")
        method = latex(row.method) + (f"$^{{\\dagger {row.mark[1:]}}}$" if row.mark else "")
        method = f"\\textbf{{{method}}}" if row.kind == "ours" else method
        lines.append(" & ".join([method, *map(latex, row.cells)]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    marks = [latex(note) for note in table.notes if note.startswith("†")]
    lines += [r"\par\smallskip\footnotesize " + r"\\ ".join(marks)] if marks else []
    lines.append(r"\end{table}")
    comments = [f"% {note}" for note in table.notes if not note.startswith("†")]
    return "\n".join([*lines, *comments]) + "\n"


def latex(text: str) -> str:
    """With every character that LaTeX reads otherwise escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def as_html(tables: Sequence[ReportTable]) -> str:
    """One page with everything inside it."""
    from ldmlab.report.report_html import page

    return page("Results", f"{len(tables)} tables.", [f"<section>{html_table(table)}</section>" for table in tables])


def html_table(table: ReportTable, figures: str = "") -> str:
    """A heading, figures if there are any, the table and its notes."""
    kinds = {"ours": "ours", "paper": "ldm", "theirs": ""}
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join(
        f'<tr class="{kinds[row.kind]}"><td>{escape(row.method)}'
        f"{f'<sup>{escape(row.mark)}</sup>' if row.mark else ''}</td>"
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in row.cells)}</tr>"
        for row in table.rows
    )
    notes = "".join(f"<li>{_code(escape(note))}</li>" for note in table.notes)
    return (
        f"<h2>{escape(table.title)}</h2>{figures}"
        f'<table class="numbers"><tr><th>{escape(table.lines)}</th>{head}</tr>{body}</table>'
        f'<ul class="dim">{notes}</ul>'
    )


def _code(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


FORMATS: dict[str, Callable[[Sequence[ReportTable]], str]] = {
    "text": as_text,
    "md": as_markdown,
    "latex": as_latex,
    "html": as_html,
}
