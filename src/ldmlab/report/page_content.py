"""Content of a page, independent of its format: texts, tables, charts and images, in sections."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ldmlab.report.line_chart import Chart

ARROW = {"lower": "↓", "higher": "↑", "info": ""}
DASH = "–"
THUMBNAIL = 96  # px, of the longer side: 40 runs of 16 images stay far below 5 MB


@dataclass(frozen=True)
class Row:
    """One row of a table; `kind` is theirs | paper (the paper's own systems) | ours."""

    kind: str
    label: str
    cells: Sequence[str]
    mark: str = ""  # of the note with the reason why it cannot be compared


@dataclass(frozen=True)
class Table:
    """A title, column heads, rows and the notes below."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    head: str = "method"  # of the first column
    text: bool = False  # cells are words, which may wrap

    @staticmethod
    def of_pairs(pairs: Sequence[tuple[str, str]], head: str = "setting") -> "Table":
        """Names and their values."""
        return Table("", ["value"], [Row("theirs", name, [value]) for name, value in pairs], (), head, True)


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    stamp: bool = False  # a label in colour


@dataclass(frozen=True)
class Charts:
    """Charts in a row, those of `more` collapsed."""

    charts: Sequence[Chart]
    more: Sequence[Chart] = ()
    title: str = ""


@dataclass(frozen=True)
class Card:
    """A group of images with a description."""

    images: Sequence[tuple[str, str]]  # file in the folder, title
    caption: str = ""
    mark: str = ""  # right | wrong | copy
    folder: Path | None = None  # of these images, if not the gallery's


@dataclass(frozen=True)
class Gallery:
    """Cards of images; `style`: cards | pairs | rows | thumbnails | wide | small."""

    folder: Path
    cards: Sequence[Card]
    style: str = "cards"
    title: str = ""
    pixels: int | None = None  # longer side of small copies in the page; None: the files themselves


@dataclass(frozen=True)
class Fold:
    """Blocks in a collapsed section."""

    title: str
    blocks: "Sequence[Block]"


Block = Text | Table | Charts | Gallery | Fold


@dataclass(frozen=True)
class Section:
    """A heading and its content."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A title, a sentence, the numbers that lead, and the sections; sections without a block are left out."""

    title: str
    lead: str
    sections: Sequence[Section]
    tiles: Sequence[tuple[str, str, str]] = ()  # name, value, meaning

    def charts(self) -> list[tuple[str, Chart]]:
        """Every chart and the heading above it, in reading order."""
        return [found for section in self.sections for found in _charts(section.blocks, section.title)]


def _charts(blocks: Sequence[Block], heading: str) -> list[tuple[str, Chart]]:
    found = []
    for block in blocks:
        if isinstance(block, Charts):
            found += [(block.title or heading, chart) for chart in (*block.charts, *block.more)]
        elif isinstance(block, Fold):
            found += _charts(block.blocks, heading)
    return found
