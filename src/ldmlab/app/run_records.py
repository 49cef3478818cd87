"""Runs on disk, for comparing them: settings, sizes, curves, scores, newest images."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmlab.errors import InputError
from ldmlab.files import by_step
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_config, read_description
from ldmlab.report.line_chart import Points
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.paper_source import PAPER_FEATURES
from ldmlab.report.score_curves import read_curves
from ldmlab.report.score_lines import by_features, described
from ldmlab.report.tradeoff_jobs import is_job, read_job
from ldmlab.training.run_folder import FINISHED

_MAIN = {"first_stage": "first_stage", "clip": "clip", "latent_diffusion": "backbone", "classifier": "classifier"}
_NETWORKS = {"Inception2015": PAPER_FEATURES, "inception_and_clip": PAPER_FEATURES, "published_clip": "open_clip"}
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
    path: Path
    stage: str
    group: str
    seed: int
    fields: dict[str, Any]  # of comparison_fields
    curves: dict[str, Points]  # columns of metrics.csv
    scores: dict[str, float]  # of its evaluations
    max_steps: int
    finished: bool
    titles: dict[str, str] = field(default_factory=dict)  # how scores and curves are called in a table

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
        return {folder.name: grids[-1] for folder in folders if (grids := by_step(folder, ".png"))}


def read_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Run folders, and folders of run folders; every run that trained once."""
    found: dict[Path, RunRecord] = {}
    left_out = []
    for folder in folders:
        inside = [folder] if (folder / "config.yaml").exists() else []
        inside = inside or sorted(p.parent for depth in ("*", "*/*") for p in folder.glob(f"{depth}/config.yaml"))
        if not inside:
            raise InputError(f"{folder} holds no run (a folder with config.yaml); give folders made by train.py.")
        for path in inside:
            if not has_trained(path):
                left_out.append(path)
            elif path.resolve() not in found:
                found[path.resolve()] = _read(path)
    if not found:
        raise InputError(f"{left_out[0]} holds no run that trained a step; give folders of runs with metrics.csv.")
    return list(found.values())


def has_trained(folder: Path) -> bool:
    """Whether a run got as far as a checkpoint or a row of numbers; a refused start has neither."""
    metrics = folder / "metrics.csv"
    if (folder / FINISHED).exists() or any((folder / "checkpoints").glob("*.ckpt")):
        return True
    return metrics.is_file() and metrics.read_bytes()[: 1 << 20].strip().count(b"\n") > 0


def _read(folder: Path) -> RunRecord:
    try:
        config = read_config(folder)
        stage, run, seed = str(config["stage"]["name"]), config["run"], int(config["seed"])
        group, max_steps = str(run.get("group") or run["name"]), int(config["trainer"]["max_steps"])
        node = ((config.get("callbacks") or {}).get("scores") or {}).get("features") or {}
        shown = " ".join(str(value) for name, value in node.items() if name != "run")
        features = _NETWORKS.get(str(node.get("_target_")).rpartition(".")[2], shown)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}, or leave this run out.") from None
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise InputError(
            f"{folder / 'config.yaml'} cannot be read as a run's ({reason}); leave this run out."
        ) from None
    metrics = folder / "metrics.csv"
    curves = read_curves(metrics) if metrics.exists() else {}
    found = scores_of(folder)
    titles = {name: title for name, (_, title) in found.items()}
    for name in curves:
        if name.startswith("in_training/"):
            titles[name] = f"{by_features(described(name.partition('/')[2])[0], features)} in training"
    return RunRecord(
        path=folder,
        stage=stage,
        group=group,
        seed=seed,
        fields=comparison_fields(read_description(folder)),
        curves=curves,
        scores={name: value for name, (value, _) in found.items()},
        max_steps=max_steps,
        finished=(folder / FINISHED).exists(),
        titles=titles,
    )


def scores_of(folder: Path) -> dict[str, tuple[float, str]]:
    """Value and title of every score of the run's evaluations; of a job of the comparison, those of its last step."""
    found: dict[str, tuple[float, str]] = {}

    def add(scores: Mapping[str, Any], features: Any, place: str, where: str) -> None:
        for name, score in scores.items():
            title = by_features(described(name, score)[0], str((features or {}).get("name")))
            found[f"{place}/{name}" if place else name] = score["value"], f"{title}, {where}" if where else title

    job = read_job(folder) if is_job(folder) else {"points": ()}
    for point in job["points"]:
        if point["step"] == job["max_steps"]:
            steps, scored_by = point["sampler_steps"], point.get("scored_by") or {}
            add(point["scores"], scored_by.get("features"), f"tradeoff_{steps}_steps", f"{steps} sampler steps")
    scored, main = bool(found), folder / "evaluation"
    for place in (main, *sorted(main.glob("*"))):
        if (place / "metrics.json").exists() and not (scored and place.name.startswith("step_")):
            result, name = read_evaluation(place), "" if place == main else place.name
            add(result["scores"], result.get("features"), name, name)
    return found


def by_configuration(runs: Sequence[RunRecord], without: str | None = None) -> dict[str, list[RunRecord]]:
    """Runs of one stage by configuration; seeds of one configuration come together."""
    names = [name for name in _NAMED if name != without and len({run.fields[name] for run in runs}) > 1]
    groups: dict[tuple[Any, ...], list[RunRecord]] = defaultdict(list)
    for run in runs:
        groups[(run.group, *(run.fields[name] for name in names))].append(run)
    several = len({run.group for run in runs}) > 1
    labels: dict[str, list[RunRecord]] = {}
    order = sorted(groups, key=lambda key: [(value is None, str(value).rjust(12)) for value in key])
    for (group, *values), members in ((key, groups[key]) for key in order):
        parts = [_NAMED[name].format(value) for name, value in zip(names, values, strict=True) if value is not None]
        labels[", ".join([*([group] if several or not parts else []), *parts])] = members
    return labels


def comparison_fields(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a model.yaml by which runs are grouped and plotted; None where a model has no such thing."""
    with torch.device("meta"):  # sizes only: nothing is allocated
        main = _module(spec, _MAIN[spec["kind"]])
        first_stage = _module(spec, "first_stage") if "first_stage" in spec else None
    node = spec.get("first_stage", {})
    return {
        "downsampling": getattr(first_stage, "downsampling", None),
        "first_stage_kind": _kind_of(node) if node else None,  # kl | vq | fsq | ... | identity
        "latent_channels": getattr(first_stage, "latent_channels", None),
        "codebook_size": getattr(first_stage, "codebook_size", None),
        "image_size": spec.get("image_size"),
        "conditioned_on": "+".join(spec.get("conditioners") or {}) or None,
        "parameters": sum(p.numel() for p in main.parameters()),  # of the network that the stage trains
    }


def _kind_of(node: Mapping[str, Any]) -> str:
    """The file of a first stage's class, or the class of the quantiser that it is given."""
    if isinstance(quantiser := node.get("quantiser"), Mapping):
        return str(quantiser["_target_"]).rpartition(".")[2].lower()
    return str(node["_target_"].split(".")[-2])


def _module(spec: Mapping[str, Any], name: str) -> nn.Module:
    built = instantiate(spec[name], where=name)
    return built if isinstance(built, nn.Module) else built.model  # a CLIP comes with its tokenizer
