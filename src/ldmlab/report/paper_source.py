"""The paper's tables as data (paper_tables.yaml): names of columns and rows, conditions, remarks of the sources."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldmlab.errors import InputError, did_you_mean

PARAMETERS = "n_params"


@cache
def source() -> dict[str, Any]:
    """All of it: tables | extra | conflicts, and column_titles | our_scores | conditions of ours."""
    return yaml.safe_load(Path(__file__).with_name("paper_tables.yaml").read_text(encoding="utf-8"))


@cache
def paper_tables() -> dict[str, dict[str, Any]]:
    """All tables by name, such as text2img/coco-256."""
    return source()["tables"] | source()["extra"]


def known_table(name: str, option: str = "protocol.paper_table=") -> dict[str, Any]:
    """The table called `name`; `option`: how it was chosen."""
    known = paper_tables()
    if name not in known:
        hint = did_you_mean(name, known, f"there are {', '.join(known)}.")
        raise InputError(f"{option}{name} is no table of the paper; {hint}")
    return known[name]


def conditions_of(name: str) -> dict[str, Any]:
    """Known conditions of a table's measurement: samples | split | rule | images | whole."""
    known = source()["conditions"]
    return known.get(name) or known.get(name.split("/")[0], {})


def amount(parameters: float) -> str:
    """1.45B, 400M, 812k."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g}{letter}"
    return f"{parameters:g}"


def methods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the rows, with the differences of rows of one name in brackets."""
    facts = [_facts(row) for row in rows]
    names = []
    for row, own in zip(rows, facts, strict=True):
        twins = [one for other, one in zip(rows, facts, strict=True) if other["method"] == row["method"]]
        apart = [text for key, text in own.items() if len({twin.get(key) for twin in twins}) > 1]
        names.append(f"{row['method']} ({', '.join(apart)})" if apart else str(row["method"]))
    return names


def _facts(row: Mapping[str, Any]) -> dict[str, str]:
    sampling, training, first = (row.get(name) or {} for name in ("sampling", "training", "first_stage"))
    facts = {
        "task": row.get("task"),
        "dataset": row.get("dataset"),
        "codebook": first.get("codebook") and f"{first['codebook']:,} codes",
        "iterations": training.get("iters") and f"{amount(training['iters'])} iterations",
        "steps": sampling.get("steps") and f"{sampling['steps']} steps",
        "eta": None if sampling.get("eta") is None else f"eta {sampling['eta']:g}",
        "scale": sampling.get("scale") and f"guidance {sampling['scale']:g}",
    }
    return {name: str(text) for name, text in facts.items() if text}


def remarks(name: str) -> tuple[str, ...]:
    """Notes and footnotes of the source of a table, and values that other sources have for its rows."""
    table = paper_tables()[name]
    notes = table.get("notes") or []
    found = [notes] if isinstance(notes, str) else list(notes)
    marked: dict[str, list[str]] = {}
    for row in table["rows"]:
        for mark, text in (row.get("marks") or {}).items():
            footnote = text if isinstance(text, str) else (table.get("footnotes") or {}).get(mark)
            if footnote:
                marked.setdefault(footnote, []).append(row["method"])
    found += [f"{', '.join(names)}: {footnote}" for footnote, names in marked.items()]
    for conflict in source()["conflicts"].values():
        if name in conflict["tables"]:
            printed = [
                f"{value['origin']}: {', '.join(f'{key} {text}' for key, text in value.items() if key != 'origin')}"
                for value in conflict["values"]
            ]
            reading = f" ({conflict['reading']})" if "reading" in conflict else ""
            found.append(f"sources disagree on {conflict['about']}: {'; '.join(printed)}{reading}")
    return tuple(found)
