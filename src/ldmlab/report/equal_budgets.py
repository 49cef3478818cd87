"""Factors compared at one budget, read off their curves: the points of all runs of a factor form one line."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ldmlab.report.trade_curves import Curve, FactorJobs, Value

X = Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]


@dataclass(frozen=True)
class EqualBudget:
    """Scores of every factor after the same spending: the most that all of them have a score for."""

    spent: float
    scores: Mapping[str, float]  # by the factor's label

    def best_first(self, direction: str) -> list[str]:
        """Labels in the order of their scores; direction: lower | higher is better."""
        return sorted(self.scores, key=lambda label: self.scores[label], reverse=direction == "higher")


def merged(factors: Sequence[FactorJobs], score: str, x: X) -> dict[str, Curve]:
    """One curve of means a factor, or a first stage of it where there are several, from runs of every length.

    Where runs of several lengths have a score each seed of each of them counts once.
    """
    stages: dict[int, set[str]] = defaultdict(set)
    for runs in factors:
        stages[runs.first["downsampling"]].add(runs.first["first_stage"])
    points: dict[str, dict[float, list[Value]]] = defaultdict(lambda: defaultdict(list))
    for runs in sorted(factors, key=lambda found: int(found.first["downsampling"])):
        f, first_stage = runs.first["downsampling"], runs.first["first_stage"]
        label = f"f{f}" if len(stages[f]) == 1 else f"f{f} ({str(first_stage).rsplit('/', 1)[-1]})"
        for at, value in runs.training_curve(score, x):
            points[label][at].append(value)
    return {
        label: [(at, _together(seen)) for at, seen in found]
        for label, found in ((label, sorted(places.items())) for label, places in points.items())
    }


def _together(values: Sequence[Value]) -> Value:
    """The mean; its deviation would mix seeds with lengths, so there is none."""
    seeds = sum(value.seeds for value in values)
    return Value(sum(value.mean * value.seeds for value in values) / seeds, None, seeds)


def equal_budget(factors: Sequence[FactorJobs], score: str, x: X) -> EqualBudget | None:
    """None of a single factor, and where no budget lies within the curves of all."""
    curves = merged(factors, score, x)
    if len(curves) < 2:
        return None
    for spent in sorted({curve[-1][0] for curve in curves.values()}, reverse=True):  # the longest training says most
        scores = {label: score_after(curve, spent) for label, curve in curves.items()}
        if all(value is not None for value in scores.values()):
            return EqualBudget(spent, {label: value for label, value in scores.items() if value is not None})
    return None


def score_after(curve: Curve, spent: float) -> float | None:
    """Between two points linear in the logarithm of what was spent; None outside the curve, with 2 % of grace."""
    if not curve[0][0] <= spent * 1.02 or not curve[-1][0] >= spent / 1.02:
        return None
    before = [point for point in curve if point[0] <= spent] or [curve[0]]
    after = [point for point in curve if point[0] >= spent] or [curve[-1]]
    (low, start), (high, end) = before[-1], after[0]
    if high <= low:
        return mean((start.mean, end.mean))
    return start.mean + math.log(spent / low) / math.log(high / low) * (end.mean - start.mean)
