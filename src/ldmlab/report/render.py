"""Pages as HTML and Markdown, tables for a terminal, Markdown, LaTeX and HTML: templates filled with rows."""

import base64
import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from ldmlab.files import encodable, markdown_line, write_text
from ldmlab.open_image import open_image, read_image
from ldmlab.report.line_chart import Chart
from ldmlab.report.page_content import Page, Section, Table

_MOST_PIXELS = 64_000_000  # of an image that is embedded
_FORMATS = {"PNG": "png", "WEBP": "webp", "GIF": "gif", "JPEG": "jpeg"}
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {"↓": r"$\downarrow$", "↑": r"$\uparrow$", "±": r"$\pm$", "–": "--", "†": r"$\dagger$"}
_LATEX |= {character: f"\\{character}" for character in "&%$#_{}"}

_COLUMNS = ("section", "chart", "line", "x_title", "x", "y")


def write_pages(out: Path, page: Page, folder: Path | None = None, points: str = "points.csv") -> Path:
    """report.md, with links to the images of `folder`, then what `write_page` writes; the path of report.html."""
    write_text(out / "report.md", markdown(page, folder))
    return write_page(out / "report.html", page, points)


def write_page(path: Path, page: Page, points: str = "points.csv") -> Path:
    """Values of the page's charts, all in the file `points` and those of each in its folder, then `path` (HTML).

    Values of charts that an earlier page had are deleted.
    """
    charts = page.charts()
    files = {path.with_name(points): charts} if charts else {}
    for section, chart in charts:
        own = path.with_name(Path(points).stem) / f"{_file_name(f'{section} {chart.title}')}.csv"
        while own in files:
            own = own.with_stem(f"{own.stem}-2")
        if chart:
            files[own] = [(section, chart)]
    for file, some in files.items():
        write_text(file, points_csv(some))
    write_text(path, html(page, points if charts else ""))
    folder = path.with_name(Path(points).stem)
    for old in {path.with_name(points), *folder.glob("*.csv")} - files.keys():
        if old.is_file() and old.read_bytes().startswith(",".join(_COLUMNS).encode()):  # no file of the user's own
            old.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
    return path


def _file_name(title: str) -> str:
    """Letters, figures and hyphens."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:100] or "chart"


def html(page: Page, points: str = "") -> str:
    """One HTML file; `points`: name of the file with the numbers of its charts."""
    style = (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")
    return encodable(_template("page.html.j2").render(page=page, style=Markup(style), points=points))


def markdown(page: Page, folder: Path | None = None) -> str:
    """The page without its charts; images of `folder` by link."""
    text = encodable(_template("page.md.j2").render(page=page, folder=folder))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def points_csv(charts: Sequence[tuple[str, Chart]]) -> str:
    """Every point of every chart: the heading above it, chart, line, name of the x axis, x, y and +-."""
    rows: list[Sequence[Any]] = [(*_COLUMNS, "spread")]
    for section, chart in charts:
        for line, points in chart.series.items():
            spreads = chart.spreads.get(line) or [None] * len(points)
            pairs = zip(points, spreads, strict=True)
            rows += [(section, chart.title, line, chart.x_title, x, y, part) for (x, y), part in pairs if x == x]
    return csv_text(rows)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return encodable(file.getvalue())


# ---- tables alone


def as_text(tables: Sequence[Table]) -> str:
    """Aligned columns; our rows begin with >, the paper's own with *."""
    lead, parts = {"ours": "> ", "paper": "* ", "theirs": "  "}, []
    for table in tables:
        lines = [(f"  {table.head}", *table.columns)]
        lines += [(lead[row.kind] + f"{row.label} {row.mark}".strip(), *row.cells) for row in table.rows]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        side, printed = "<" if table.text else ">", []
        for name, *cells in lines:
            padded = [f"{cell:{side}{width}}" for cell, width in zip(cells, others, strict=True)]
            printed.append("  ".join([f"{name:<{first}}", *padded]))
        rule = "-" * max(map(len, printed))
        head, *body = (line.rstrip() for line in printed)
        parts.append("\n".join([table.title, rule, head, rule, *body, rule, *table.notes]))
    return "\n\n".join(parts) + "\n"


def as_markdown(tables: Sequence[Table]) -> str:
    """Our rows in bold."""
    page = Page("", "", [Section("", [table]) for table in tables])
    text = _template("page.md.j2").render(page=page, folder=None)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"^#{1,2} *$", "", text, flags=re.MULTILINE)).strip() + "\n"


def as_latex(tables: Sequence[Table]) -> str:
    """`table` environments for booktabs, notes without a mark as comments."""
    return _template("tables.tex.j2").render(tables=tables) + "\n"


def as_html(tables: Sequence[Table]) -> str:
    return html(Page("Results", f"{len(tables)} tables.", [Section(table.title, [table]) for table in tables]))


FORMATS = {"text": as_text, "md": as_markdown, "latex": as_latex, "html": as_html}


# ---- templates


@cache
def _template(name: str) -> jinja2.Template:
    """HTML is escaped automatically; Markdown and LaTeX through the filters `md`, `cell`, `link` and `latex`."""
    tex = {"variable_start_string": "<<", "variable_end_string": ">>"} if name.endswith(".tex.j2") else {}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ldmlab.report"),
        autoescape=name.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        **tex,  # type: ignore[arg-type]
    )
    environment.filters |= {
        "code": lambda text: Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))),
        "md": markdown_line,
        "note": lambda text: markdown_line(text, r"\\\[\]<"),  # the same, but `code` stays
        "cell": lambda text: markdown_line(text, r"\\\[\]<|"),
        "link": lambda file: re.sub(r"[<>\n]", "", str(file)),
        "latex": latex,
        "image": _image,
        "kind": lambda block: type(block).__name__.lower(),
    }
    environment.tests["marked"] = lambda note: note.startswith("†")
    return environment.get_template(name)


def latex(text: str) -> str:
    """With LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def _image(folder: Path, file: str, pixels: int | None) -> str:
    """A data address: the file itself, or a WebP of `pixels`; empty where the folder holds no such image."""
    try:
        path = folder / file
        if not path.resolve().is_relative_to(folder.resolve()):
            return ""
        content = read_image(path)
        image = open_image(content, tuple(_FORMATS))
        if image.width * image.height > _MOST_PIXELS:
            return ""
        if pixels is None:
            image.load()
            return _data(_FORMATS[str(image.format)], content)
        small = image.convert("RGB")
    except (OSError, ValueError, TypeError, SyntaxError):
        return ""
    small.thumbnail((pixels, pixels), Image.Resampling.BICUBIC)
    saved = io.BytesIO()
    small.save(saved, "WEBP", quality=75)
    return _data("webp", saved.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
