"""Evaluations beside one another: one table for each measurement, and a mean over training seeds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from ldmlab.report.report_table import (
    ARROW,
    DASH,
    ReportTable,
    TableRow,
    comparable_groups,
    measurement_line,
    repeat_line,
)
from ldmlab.report.score_names import options_of, score_text

Lines = Sequence[Mapping[str, str]]  # the printed scores of one evaluation


@dataclass(frozen=True)
class _Column:
    """Numbers that may stand below one another."""

    name: str
    shown: str
    options: str  # of the score, as JSON

    @staticmethod
    def of(line: Mapping[str, str], result: Mapping[str, Any]) -> "_Column":
        shown = f"{line['shown']} {ARROW[line['direction']]}".strip()
        return _Column(line["name"], shown, json.dumps(options_of(line["name"], result), sort_keys=True))

    def takes(self, result: Mapping[str, Any]) -> bool:
        """Whether the result's number was made by these options."""
        return json.loads(self.options) == options_of(self.name, result)

    def title(self, others: Sequence["_Column"]) -> str:
        """With the options in which it differs from columns of the same score."""
        twins = [json.loads(other.options) for other in others if other.shown == self.shown]
        own = json.loads(self.options)
        apart = [f"{name}={value}" for name, value in own.items() if any(twin.get(name) != value for twin in twins)]
        return f"{self.shown} ({', '.join(apart)})" if apart else self.shown


def comparison_tables(
    results: Sequence[Mapping[str, Any]], names: Sequence[str], scores: Sequence[Lines]
) -> list[ReportTable]:
    """One table for each measurement; `scores`: the printed lines of each evaluation."""
    return [
        _table([results[i] for i in group], [names[i] for i in group], [scores[i] for i in group])
        for group in comparable_groups(results)
    ]


def _table(results: Sequence[Mapping[str, Any]], names: Sequence[str], scores: Sequence[Lines]) -> ReportTable:
    values = [
        {_Column.of(line, result): line["value"] for line in lines}
        for result, lines in zip(results, scores, strict=True)
    ]
    columns = list(dict.fromkeys(column for row in values for column in row))
    rows = [
        TableRow("ours", name, tuple(row.get(column, DASH) for column in columns))
        for name, row in zip(names, values, strict=True)
    ]
    rows += [_mean_row(seeds, columns) for seeds in _by_configuration(results)]
    notes = [f"To repeat {name}: {repeat_line(result)}" for name, result in zip(names, results, strict=True)]
    titles = tuple(column.title(columns) for column in columns)
    return ReportTable(measurement_line(results[0]), titles, tuple(rows), tuple(notes))


def _by_configuration(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Evaluations of models that were trained alike but for the seed, and are scored alike."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        model = result["model"]
        if model.get("configuration") is not None:
            alike = [model[name] for name in ("configuration", "step", "weights")]
            key = json.dumps([alike, model.get("guiders"), result["protocol"]], sort_keys=True, default=str)
            groups.setdefault(key, []).append(result)
    return [found for found in groups.values() if len(found) > 1 and _different_seeds(found)]


def _different_seeds(results: Sequence[Mapping[str, Any]]) -> bool:
    return len({result["model"]["training_seed"] for result in results}) == len(results)


def _mean_row(results: Sequence[Mapping[str, Any]], columns: Sequence[_Column]) -> TableRow:
    """Sample mean and sample standard deviation of what every seed has."""
    cells = []
    for column in columns:
        found = [result["scores"].get(column.name) for result in results]
        numbers = [score["value"] for score in found if score is not None]
        whole = len(numbers) == len(results) and column.takes(results[0])
        cells.append(score_text(column.name, mean(numbers), stdev(numbers)) if whole else DASH)
    group = results[0]["model"].get("group") or "runs alike"
    return TableRow("ours", f"{group}, mean ± deviation over {len(results)} seeds", tuple(cells))
