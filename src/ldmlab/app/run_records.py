"""Runs as they lie on disk, for comparing them: settings, curves, scores, newest images."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ldmlab.app.comparison import comparison_fields
from ldmlab.errors import InputError
from ldmlab.model_files import read_description
from ldmlab.report.line_chart import Points
from ldmlab.report.pages import read_evaluation
from ldmlab.report.run_curves import read_curves
from ldmlab.report.tradeoff_jobs import is_job, read_job
from ldmlab.training.run_folder import FINISHED

_NAMED = {  # how a field reads in a label
    "downsampling": "f{}",
    "first_stage_kind": "{}",
    "latent_channels": "{} channels",
    "codebook_size": "{} codes",
    "image_size": "{} px",
    "conditioned_on": "{}",
    "parameters": "{:,} parameters",
}


@dataclass(frozen=True)
class RunRecord:
    """One run folder."""

    path: Path
    stage: str
    group: str
    seed: int
    fields: dict[str, Any]  # of comparison_fields
    curves: dict[str, Points]  # columns of metrics.csv
    scores: dict[str, float]  # of its evaluations
    max_steps: int
    finished: bool

    @property
    def step(self) -> int:
        """The last one with a row."""
        return int(max((points[-1][0] for points in self.curves.values()), default=0))

    def last(self, metric: str) -> float | None:
        """The newest value of a column, or a score of that name."""
        points = self.curves.get(metric)
        return points[-1][1] if points else self.scores.get(metric)

    def images(self) -> dict[str, Path]:
        """The newest grid of each panel."""
        folders = sorted(path for path in (self.path / "samples").glob("*") if path.is_dir())
        return {folder.name: newest[-1] for folder in folders if (newest := sorted(folder.glob("step_*.png")))}


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Run folders, and folders of run folders; every run once."""
    found: dict[Path, RunRecord] = {}
    for folder in folders:
        inside = [folder] if (folder / "config.yaml").exists() else sorted(p.parent for p in _configs(folder))
        if not inside:
            raise InputError(f"{folder} holds no run (a folder with config.yaml); give folders made by train.py.")
        found |= {path.resolve(): _read(path) for path in inside if path.resolve() not in found}
    return list(found.values())


def _configs(folder: Path) -> list[Path]:
    return [*folder.glob("*/config.yaml"), *folder.glob("*/*/config.yaml")]


def _read(folder: Path) -> RunRecord:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        stage, run, seed = config["stage"]["name"], config["run"], config["seed"]
        max_steps = config["trainer"]["max_steps"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / 'config.yaml'} cannot be read as a run's ({error!r}); leave this run out."
        ) from None
    metrics = folder / "metrics.csv"
    return RunRecord(
        path=folder,
        stage=stage,
        group=run.get("group") or run["name"],
        seed=seed,
        fields=comparison_fields(read_description(folder)),
        curves=read_curves(metrics) if metrics.exists() else {},
        scores=scores_of(folder),
        max_steps=max_steps,
        finished=(folder / FINISHED).exists(),
    )


def scores_of(folder: Path) -> dict[str, float]:
    """Numbers of the run's own evaluations; those of further ones carry their folder's name.

    A job of the downsampling comparison has a folder for each point of its curves: here are those of the last step.
    """
    found = _last_points(folder) if is_job(folder) else {}
    places = [folder / "evaluation", *sorted((folder / "evaluation").glob("*"))]
    for place in places:
        if (place / "metrics.json").exists() and not (found and place.name.startswith("step_")):
            prefix = "" if place == places[0] else f"{place.name}/"
            found |= {prefix + name: score["value"] for name, score in read_evaluation(place)["scores"].items()}
    return found


def _last_points(folder: Path) -> dict[str, float]:
    record = read_job(folder)
    return {
        f"tradeoff_{point['sampler_steps']}_steps/{name}": score["value"]
        for point in record["points"]
        if point["step"] == record["max_steps"]
        for name, score in point["scores"].items()
    }


def by_configuration(runs: Sequence[RunRecord], without: str | None = None) -> dict[str, list[RunRecord]]:
    """Runs of one stage by what tells their configurations apart; seeds of one configuration come together."""
    names = [name for name in _NAMED if name != without and len({run.fields[name] for run in runs}) > 1]
    groups: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for run in runs:
        groups[(run.group, *(run.fields[name] for name in names))].append(run)
    several = len({run.group for run in runs}) > 1
    labels: dict[str, list[RunRecord]] = {}
    for (group, *values), members in groups.items():
        parts = [_NAMED[name].format(value) for name, value in zip(names, values, strict=True) if value is not None]
        labels[", ".join([*([group] if several or not parts else []), *parts])] = members
    return labels
