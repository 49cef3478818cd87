"""Jobs of the downsampling comparison, read from their folders and put together over seeds."""

import csv
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ldmlab import format1
from ldmlab.errors import InputError
from ldmlab.instantiate import completed
from ldmlab.report.score_names import number_text

FORMAT_VERSION = 1
RECORD = "tradeoff.json"
PETA = 1e15


def trained_seconds(path: Path, step: int | None) -> float | None:
    """Wall-clock seconds until `step` (None: the last) by a run's metrics.csv; None where speed was not logged."""
    seconds, before = 0.0, 0.0
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
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
    """tradeoff.json of a denoiser's folder."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / RECORD} cannot be read ({error}); run the job of the sweep again.") from None
    if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
        raise InputError(f"{folder / RECORD} is of another version; run the job of the sweep again.")
    return format1.record(found) | {"folder": str(folder)}


def check_one_measure(jobs: Sequence[Mapping[str, Any]]) -> None:
    """Curves of one figure share protocol, features and reference images."""

    def measure(job: Mapping[str, Any]) -> tuple[Any, ...]:
        by = job["points"][0]["scored_by"] if job["points"] else {"features": {}}
        network = [by["features"].get(name) for name in ("name", "weights_hash")]  # older records say no more
        return network, by.get("reference")

    def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
        """Options that came later were at their defaults before."""
        return a == b or completed(a, where="protocol") == completed(b, where="protocol")

    for job in jobs[1:]:
        if measure(job) != measure(jobs[0]) or not same(job["protocol"], jobs[0]["protocol"]):
            raise InputError(
                f"{job['folder']} and {jobs[0]['folder']} were scored by different protocols, features or reference "
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


@dataclass(frozen=True)
class FactorJobs:
    """The seeds of one factor, which share everything else."""

    label: str
    jobs: Sequence[Mapping[str, Any]]

    @property
    def first(self) -> Mapping[str, Any]:
        """What all of them share."""
        return self.jobs[0]

    def training_curve(self, score: str, x: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]) -> Curve:
        """Over the points of the training, at the protocol's own sampler steps; x: of (job, point)."""
        usual = self.jobs[0]["points"][0]["sampler_steps"]
        return self._curve(score, x, lambda point: point["sampler_steps"] == usual, "step")

    def sampling_curve(self, score: str, x: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]) -> Curve:
        """Over sampler steps, of the last checkpoint."""
        return self._curve(score, x, lambda point: point["step"] == self.first["max_steps"], "sampler_steps")

    def _curve(
        self,
        score: str,
        x: Callable[[Mapping[str, Any], Mapping[str, Any]], float | None],
        wanted: Callable[[Mapping[str, Any]], bool],
        order: str,
    ) -> Curve:
        """Means over the seeds that have every point of the curve; over those at hand where none has."""
        runs = [
            {
                p[order]: (x(job, p), p["scores"][score]["value"])
                for p in job["points"]
                if wanted(p) and score in p["scores"]
            }
            for job in self.jobs
        ]
        everywhere = sorted(set().union(*runs))
        whole = [run for run in runs if len(run) == len(everywhere)] or runs
        curve = []
        for at in everywhere:
            seen = [run[at] for run in whole if at in run]
            places = [place for place, _ in seen if place is not None]
            if places:
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


def by_factor(jobs: Sequence[Mapping[str, Any]]) -> list[FactorJobs]:
    """Groups that differ in their seed alone, finest latents first; a label says what tells groups of one f apart."""
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for job in jobs:
        groups[_identity(job)].append(job)
    for found in groups.values():
        seeds = [job["seed"] for job in found]
        if len(set(seeds)) < len(seeds):
            raise InputError(
                f"{found[0]['folder']} and {found[-1]['folder']} are alike down to the seed, or differ in an option "
                "that the comparison does not hold apart; give one of them."
            )
    keys = sorted(groups, key=lambda key: (key[0], *map(str, key[1:])))
    shown = {key: _label(key, keys) for key in keys}
    return [FactorJobs(shown[key], groups[key]) for key in keys]


_APART = ("downsampling", "first_stage", "parameters", "max_steps", "images_per_step")


def _identity(job: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(job[name] for name in _APART)


def _label(key: tuple[Any, ...], keys: Sequence[tuple[Any, ...]]) -> str:
    """f4, and what differs among the groups of f = 4."""
    same = [other for other in keys if other[0] == key[0]]
    notes = []
    for place, name in enumerate(_APART[1:], 1):
        if len({other[place] for other in same}) > 1:
            value = Path(key[place]).name if name == "first_stage" else f"{name.replace('_', ' ')} {key[place]:,}"
            notes.append(value)
    return f"f{key[0]}" + (f" ({', '.join(notes)})" if notes else "")
