"""The page and the file of a study's results, with a row in the paper's table of user studies."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError
from ldmlab.files import write_json
from ldmlab.report.page_content import DASH, Page, Row, Section, Table, Text
from ldmlab.report.paper_source import known_table
from ldmlab.report.paper_table import filled_table
from ldmlab.report.render import as_text, write_page
from ldmlab.study.answers import Answers, Interval, Preferences, preferences
from ldmlab.study.design import REAL, Study, read_study

_COLUMN = {1: "preference_vs_gt_percent", 2: "preference_score_percent"}


def check_table(name: str, task: int, methods: int) -> None:
    """InputError for a table in which a study cannot get a row."""
    known_table(name, "--paper-table ")
    if not name.startswith("user-study/"):
        raise InputError(f"--paper-table {name} is not one of user studies; choose one that begins with user-study/.")
    if task == 2 and methods != 2:
        raise InputError(f"--paper-table {name} is for two methods in task 2, not {methods}; leave it out.")


def write_results(folders: list[Path], out: Path) -> str:
    """preferences.json and report.html of one or more studies into `out`; the tables as text."""
    studies = {folder: read_study(folder) for folder in folders}
    answers = {folder: Answers(folder, study) for folder, study in studies.items()}
    found = {folder: preferences(study, [*answers[folder].sessions.values()]) for folder, study in studies.items()}
    sections, record = [], {}
    for folder, study in studies.items():
        tables = [_shares(study, found[folder]), *_strengths(study, found[folder])]
        tables.append(_raters(study, found[folder], answers[folder].damaged))
        sections.append(Section(f"{study.title}: task {study.task}", [Text(_how(study)), *tables]))
        record[str(folder)] = _plain(study, found[folder])
    for name in dict.fromkeys(study.paper_table for study in studies.values() if study.paper_table):
        own = {folder: study for folder, study in studies.items() if study.paper_table == name}
        sections.append(Section("Beside the paper's studies", [_paper(name, own, found)]))
    write_json(out / "preferences.json", record)
    lead = "Shares with 95 % intervals: raters and items are both drawn anew."
    page = Page("User study", lead, sections)
    write_page(out / "report.html", page)
    return as_text([block for section in sections for block in section.blocks if isinstance(block, Table)])


def _how(study: Study) -> str:
    time = f"shown for {study.seconds:g} s" if study.seconds else "shown until the answer"
    return f"“{study.question}” {len(study.rated)} items, {time}, {study.per_session} of them per session."


def _text(interval: Interval, places: int = 1) -> str:
    return f"{interval.value:.{places}f} ({interval.low:.{places}f} .. {interval.high:.{places}f})"


def _shares(study: Study, found: Preferences) -> Table:
    rows = []
    for (a, b), share in found.shares.items():
        label = f"{b} preferred to real images" if a == REAL else f"{b} preferred to {a}"
        rows.append(Row("ours", label, [_text(share)]))
    notes = ["50 %: as good as real images."] if study.task == 1 else []
    return Table("Preference", ["share, %"], rows, notes, head="methods")


def _strengths(study: Study, found: Preferences) -> list[Table]:
    if len(study.methods) < 3:
        return []
    ranked = sorted(found.strengths.items(), key=lambda entry: -entry[1].value)
    rows = [Row("ours", name, [_text(value, 2)]) for name, value in ranked]
    return [Table("Bradley-Terry", ["log strength"], rows, ["A difference d is preferred in 1 / (1 + exp(-d))."])]


def _raters(study: Study, found: Preferences, damaged: int) -> Table:
    none = "no item has two answers"
    pairs = [
        ("sessions that count", f"{found.raters}"),
        ("answers", f"{found.answers}"),
        *((f"left out: {rule}", f"{count}") for rule, count in found.excluded.items()),
        *([("lines of answers.jsonl that cannot be read", f"{damaged}")] if damaged else []),
        ("Krippendorff's alpha", none if found.alpha is None else f"{found.alpha:.2f}"),
        ("pairs of answers that agree, %", none if found.agreement is None else f"{100 * found.agreement:.0f}"),
        ("rules stated before", ", ".join(f"{rule}={value:g}" for rule, value in asdict(study.rules).items())),
    ]
    return Table.of_pairs(pairs, head="raters")


def _paper(name: str, studies: Mapping[Path, Study], found: Mapping[Path, Preferences]) -> Table:
    """The paper's table with a row for each method of these studies."""
    columns = list(known_table(name)["directions"])
    cells: dict[str, dict[str, str]] = {}
    for folder, study in studies.items():
        column = _COLUMN[study.task]
        for method, share in _scores(study, found[folder]).items():
            cells.setdefault(method, {})[column] = _text(share)
    rows = [Row("ours", method, [own.get(c, DASH) for c in columns], "†") for method, own in cells.items()]
    table = filled_table(name)
    note = "† ours: other raters, images and counts than the paper's, whose numbers are not printed (n.p.)."
    return replace(table, rows=(*table.rows, *rows), notes=(*table.notes, note))


def _scores(study: Study, found: Preferences) -> dict[str, Interval]:
    """Task 1: preferred to real images; task 2 of two methods: won by each."""
    if study.task == 1:
        return {b: share for (_, b), share in found.shares.items()}
    if len(study.methods) - (REAL in study.methods) > 2:
        raise InputError("paper_table is for two methods in task 2; make a study of two.")
    ((a, b), share), *_ = found.shares.items()
    return {a: Interval(100 - share.value, 100 - share.high, 100 - share.low), b: share}


def _plain(study: Study, found: Preferences) -> dict[str, Any]:
    shares = [{"methods": list(pair), "preferred": pair[1], **asdict(share)} for pair, share in found.shares.items()]
    return {"task": study.task, "seed": study.seed, **asdict(replace(found, shares={})), "shares": shares}
