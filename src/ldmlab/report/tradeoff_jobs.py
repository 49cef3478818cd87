"""Jobs of the downsampling comparison: read from their folders, grouped over seeds, compared at equal budgets."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ldmlab.errors import InputError
from ldmlab.instantiate import completed
from ldmlab.report.line_chart import GAP, Points
from ldmlab.report.metrics_json import read_record, reading
from ldmlab.report.score_curves import metric_rows
from ldmlab.report.score_lines import number_text

FORMAT_VERSION = 1
RECORD = "tradeoff.json"
PETA = 1e15
_LARGEST = 1e30
_OF_JOB: dict[str, type] = {
    **dict.fromkeys(("downsampling", "seed", "max_steps", "images_per_step", "processes", "parameters"), int),
    **{"forward": float, "decoder": float, "budget": str, "first_stage": str, "latent": list, "points": list},
    **{"protocol": dict, "seconds_per_image": dict},
}
_OF_POINT: dict[str, type] = {"step": int, "sampler_steps": int, "flops": float, "scores": dict, "scored_by": dict}
_AGAIN = "run the job of the sweep again."


def trained_seconds(path: Path, step: int | None) -> float | None:
    """Wall-clock seconds until `step` (None: the last) by a run's metrics.csv; None where speed was not logged."""
    seconds, before = 0.0, 0.0
    for row in metric_rows(path):
        if not row.get("speed/images_per_second") or not row.get("images"):
            continue
        if step is not None and int(row["step"]) > step:
            break
        images = float(row["images"])
        seconds += max(images - before, 0.0) / float(row["speed/images_per_second"])
        before = max(images, before)
    return seconds if before else None


def is_job(folder: Path) -> bool:
    """Whether a job of the comparison has been scored here."""
    return (folder / RECORD).exists()


def read_job(folder: Path) -> dict[str, Any]:
    """tradeoff.json of a denoiser's folder; its points are complete."""
    try:
        found = read_record(folder / RECORD, _AGAIN, (FORMAT_VERSION,))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no {RECORD}; {_AGAIN}") from None
    with reading(folder / RECORD, "points", _AGAIN):
        for point in found["points"]:
            for score in point["scores"].values():
                score["value"] = float(score["value"])
    return found | {"folder": str(folder)}


def check_complete(job: Mapping[str, Any]) -> None:
    """Checks that all data of a page are present and of the right type."""
    with reading(Path(job["folder"]) / RECORD, "the job", _AGAIN):
        _typed(job, _OF_JOB)
        for point in [*job["points"], job["points"][0]]:  # at least one
            _typed(point, _OF_POINT)
            _typed({"seconds": point["seconds"] or 0, **point["scored_by"]}, {"seconds": float, "features": dict})
        lost = job["reconstruction"]
        _typed({name: score["value"] for name, score in (lost or {}).items()}, dict.fromkeys(lost or (), float))
        _typed(job["seconds_per_image"], dict.fromkeys(job["seconds_per_image"], float))


def _typed(node: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Refuses values of another type, and impossible numbers."""
    for name, kind in types.items():
        value = node[name]
        fits = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not fits or (kind in (int, float) and not abs(value) < _LARGEST):
            raise ValueError(f"{name}={str(value)[:40]}")


def check_one_measure(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Curves of one figure share protocol, features and reference images."""

    def measure(job: Mapping[str, Any]) -> tuple[Any, ...]:
        by = job["points"][0]["scored_by"]  # older records hold no more than this
        return by["features"].get("name"), by["features"].get("weights_hash"), by.get("reference")

    first = jobs[0]
    for job in jobs[1:]:
        differ = measure(job) != measure(first)
        if not differ and job["protocol"] != first["protocol"]:  # options added later had their defaults before
            one, other = (completed(each["protocol"], where="protocol") for each in (job, first))
            differ = one != other
        if differ:
            raise InputError(
                f"{job['folder']} and {first['folder']} were scored by different protocols, features or reference "
                "images, so one figure cannot hold both; give them to two reports."
            )


@dataclass(frozen=True)
class Value:
    """Mean and deviation over seeds; no deviation of a single one."""

    mean: float
    deviation: float | None
    seeds: int

    @staticmethod
    def of(values: Sequence[float]) -> "Value":
        """Sample mean and sample standard deviation."""
        return Value(mean(values), stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return number_text(self.mean, self.deviation)


Curve = list[tuple[float, Value]]  # x, score
X = Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]  # of (job, point)


@dataclass(frozen=True)
class FactorJobs:
    """The seeds of one factor, which share everything else."""

    label: str
    jobs: Sequence[Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        """Settings that are equal in all of them."""
        return self.jobs[0]

    def training_curve(self, score: str, x: X) -> Curve:
        """Over the points of the training, at the protocol's own sampler steps; x: of (job, point)."""
        return self._curve(score, x, "step", "sampler_steps", self.first["points"][0]["sampler_steps"])

    def sampling_curve(self, score: str, x: X) -> Curve:
        """Over sampler steps, of the last checkpoint."""
        return self._curve(score, x, "sampler_steps", "step", self.first["max_steps"])

    def _curve(self, score: str, x: X, over: str, fixed: str, value: int) -> Curve:
        """Means over the seeds that have every point of the curve; over all seeds if none has."""
        runs = []
        for job in self.jobs:
            taken = [point for point in job["points"] if point[fixed] == value and score in point["scores"]]
            runs.append({point[over]: (x(job, point), point["scores"][score]["value"]) for point in taken})
        everywhere = sorted(set().union(*runs))
        whole = [run for run in runs if len(run) == len(everywhere)] or runs
        curve = []
        for at in everywhere:
            seen = [run[at] for run in whole if at in run]
            if places := [place for place, _ in seen if place is not None]:
                curve.append((mean(places), Value.of([value for _, value in seen])))
        return curve

    def final(self, score: str) -> Value | None:
        """At the end of the training."""
        curve = self.training_curve(score, lambda _, point: point["step"])
        return curve[-1][1] if curve else None

    def reconstruction(self, score: str) -> float | None:
        """Of the first stage; f = 1 has no distance to itself."""
        scores = self.first["reconstruction"]
        if scores is None:
            return 0.0 if score in ("fid", "kid", "lpips") else None
        return float(scores[score]["value"]) if score in scores else None


_APART = ("downsampling", "first_stage", "parameters", "max_steps", "images_per_step")


def by_factor(jobs: Sequence[Mapping[str, Any]]) -> list[FactorJobs]:
    """Groups that differ in their seed alone, finest latents first; labels hold the differences at one f."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for job in jobs:
        groups[tuple(job[name] for name in _APART)].append(job)
    for found in groups.values():
        if len({job["seed"] for job in found}) < len(found):
            raise InputError(
                f"{found[0]['folder']} and {found[-1]['folder']} are equal including the seed, or differ in an option "
                "that the comparison does not distinguish; give one of them."
            )
    keys = sorted(groups, key=lambda key: (key[0], *map(str, key[1:])))
    return [FactorJobs(_label(key, [other for other in keys if other[0] == key[0]]), groups[key]) for key in keys]


def _label(key: tuple[Any, ...], same: Sequence[tuple[Any, ...]]) -> str:
    """f4, and what differs among the groups of f = 4."""
    notes = []
    for name, value, *others in zip(_APART[1:], key[1:], *(other[1:] for other in same), strict=True):
        if len(set(others)) > 1:
            notes.append(Path(value).name if name == "first_stage" else f"{name.replace('_', ' ')} {value:,}")
    return f"f{key[0]}" + (f" ({', '.join(notes)})" if notes else "")


# ---- factors compared at one budget, read off their curves


@dataclass(frozen=True)
class EqualBudget:
    """Scores of every factor at the same cost: the highest for which all of them have a score."""

    spent: float
    scores: Mapping[str, float]  # by the factor's label

    def best_first(self, direction: str) -> list[str]:
        """Labels in the order of their scores; direction: lower | higher is better."""
        return sorted(self.scores, key=lambda label: self.scores[label], reverse=direction == "higher")


def merged(factors: Sequence[FactorJobs], score: str, x: X) -> dict[str, Curve]:
    """One curve of means a factor, or a first stage of it where there are several, from runs of every length.

    Where runs of several lengths have a score, each seed of each length counts once; a deviation would mix seeds with
    lengths, so there is none.
    """
    curves: dict[str, Curve] = {}
    for label, by_run in _curves(factors, score, x).items():
        places: dict[float, list[Value]] = defaultdict(list)
        for at, value in (point for curve in by_run for point in curve):
            places[at].append(value)
        curves[label] = []
        for at, seen in sorted(places.items()):
            seeds = sum(value.seeds for value in seen)
            curves[label].append((at, Value(sum(value.mean * value.seeds for value in seen) / seeds, None, seeds)))
    return curves


def by_length(factors: Sequence[FactorJobs], score: str, x: X) -> dict[str, Points]:
    """The same runs as lines for charts: runs of different lengths are not joined."""
    lines: dict[str, Points] = {}
    for label, by_run in _curves(factors, score, x).items():
        points = [point for curve in by_run for point in (GAP, *((at, value.mean) for at, value in curve))]
        lines[label] = points[1:]
    return lines


def _curves(factors: Sequence[FactorJobs], score: str, x: X) -> dict[str, list[Curve]]:
    """The curve of each run that has points, by factor, or by its first stage where it has several."""
    stages: dict[int, set[str]] = defaultdict(set)
    for runs in factors:
        stages[runs.first["downsampling"]].add(runs.first["first_stage"])
    found: dict[str, list[Curve]] = defaultdict(list)
    for runs in sorted(factors, key=lambda one: int(one.first["downsampling"])):
        f, first_stage = runs.first["downsampling"], runs.first["first_stage"]
        label = f"f{f}" if len(stages[f]) == 1 else f"f{f} ({str(first_stage).rsplit('/', 1)[-1]})"
        if curve := runs.training_curve(score, x):
            found[label].append(curve)
    return found


def equal_budget(factors: Sequence[FactorJobs], score: str, x: X) -> EqualBudget | None:
    """None of a single factor, and where no budget lies within the curves of all."""
    curves = merged(factors, score, x)
    for spent in sorted({curve[-1][0] for curve in curves.values()}, reverse=True):  # the longest first
        scores = {label: value for label, curve in curves.items() if (value := score_after(curve, spent)) is not None}
        if len(scores) == len(curves) > 1:
            return EqualBudget(spent, scores)
    return None


def score_after(curve: Curve, spent: float) -> float | None:
    """Between two points linear in the logarithm of the cost; None outside the curve (tolerance 2 %)."""
    if not curve[0][0] <= spent * 1.02 or not curve[-1][0] >= spent / 1.02:
        return None
    before = [point for point in curve if point[0] <= spent] or [curve[0]]
    after = [point for point in curve if point[0] >= spent] or [curve[-1]]
    (low, start), (high, end) = before[-1], after[0]
    if high <= low:
        return mean((start.mean, end.mean))
    return start.mean + math.log(spent / low) / math.log(high / low) * (end.mean - start.mean)
