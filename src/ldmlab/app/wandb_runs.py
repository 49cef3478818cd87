"""Runs at W&B: scores of evaluate.py in the run of their model, and the page of dashboard.py as a saved view."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab.app.dashboard import STAGES, by_stage, is_unseen, metrics_of
from ldmlab.app.run_records import RunRecord, comparison_fields, scores_of
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_config, read_description
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB

_COLUMNS = ("downsampling", "first_stage_kind", "latent_channels", "codebook_size", "parameters")


def send_scores(run_folder: Path, out: Path | None = None) -> None:
    """All evaluations of the run, and one elsewhere, to its W&B run if it has one; never an error: files hold them.

    Names are evaluation/FOLDER/SCORE, where FOLDER is that of the evaluation: its protocol unless chosen otherwise.
    """
    try:
        _send(run_folder, out)
    except Exception as error:  # no network, no account, no wandb: the score is not lost for that
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        _say(f"W&B did not take the scores ({reason}); they are in {out or run_folder}, and go with the next ones.")


def _send(run_folder: Path, out: Path | None) -> None:
    logger, settings = _logger_of(run_folder)
    if logger is None:
        return
    values = scores_of(run_folder)
    if out is not None and not out.resolve().is_relative_to((run_folder / "evaluation").resolve()):
        found = read_evaluation(out)["scores"]
        values |= {f"{out.name}/{name}": score["value"] for name, score in found.items()}
    run = RunFolder(run_folder, json.loads((run_folder / "provenance.json").read_text())["run_id"])
    try:
        run.lock()
    except InputError:  # two processes in one W&B run would overwrite each other
        _say(f"{run_folder} is still training; its W&B run gets these scores with those of the next evaluation.")
        return
    try:
        logger.send_scores(run, settings, {f"evaluation/{name}": value for name, value in values.items()})
    finally:
        run.close()


def _logger_of(run_folder: Path) -> tuple[WandB | None, dict[str, Any]]:
    """The W&B logger that the run was trained with, if any, and its settings."""
    if not (run_folder / "config.yaml").exists() or not (run_folder / "provenance.json").exists():
        return None, {}
    config: Mapping[str, Any] = read_config(run_folder)
    target = f"{WandB.__module__}.{WandB.__qualname__}"
    for name, node in (config.get("logger") or {}).items():
        if node and node.get("_target_") == target and node.get("mode") != "disabled":
            logger = instantiate(node, where=f"logger.{name}")
            return logger, {**config, **comparison_fields(read_description(run_folder))}
    return None, {}


def _say(text: str) -> None:
    print(text, file=sys.stderr)


# ---- a saved view


def workspace(runs: Sequence[RunRecord], entity: str, project: str, title: str) -> Any:
    """A view that is not saved yet: a section a stage, configurations together, seeds as mean and spread."""
    ws, _ = _packages()
    groups = sorted({run.group for run in runs})
    return ws.Workspace(
        name=title,
        entity=entity,
        project=project,
        sections=[_section(stage, members) for stage, members in by_stage(runs).items()] + _images(runs),
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group").isin(groups)),
            groupby=[ws.Metric("JobType"), ws.Config("downsampling"), ws.Config("first_stage_kind")],
            pinned_columns=[f"config:{name}" for name in _COLUMNS],
        ),
        settings=ws.WorkspaceSettings(max_runs=max(10, min(len(runs), 100))),
    )


def _section(stage: str, members: Sequence[RunRecord]) -> Any:
    ws, wr = _packages()
    metrics = metrics_of(members, stage)
    scores = [f"evaluation/{name}" for name in sorted({name for run in members for name in run.scores})]
    panels = [
        wr.LinePlot(title=name, x="Step", y=[name], groupby_aggfunc="mean", groupby_rangefunc="stddev")
        for name in metrics
    ]
    panels += [wr.BarPlot(title=name, metrics=[name]) for name in scores]  # of evaluate.py: one number a run
    if len({run.fields["downsampling"] for run in members} - {None}) > 1:
        panels += [
            wr.ScatterPlot(
                title=f"{name} over the downsampling factor",
                x=wr.Config("downsampling"),
                y=wr.SummaryMetric(name),
                log_x=True,
            )
            for name in [*filter(is_unseen, metrics), *scores]
        ]
    return ws.Section(name=STAGES[stage][0], panels=panels, is_open=True)


def _images(runs: Sequence[RunRecord]) -> list[Any]:
    ws, wr = _packages()
    names = sorted({name for run in runs for name in run.images()})
    panels = [wr.MediaBrowser(title=name, media_keys=[name], num_columns=4) for name in names]
    return [ws.Section(name="Newest images", panels=panels, is_open=True)] if panels else []


def save_view(view: Any) -> str:
    """Save it under the account that is logged in; its address."""
    import wandb

    try:
        return str(view.save().url)
    except (wandb.Error, ValueError, OSError) as error:  # no account, no network, no such project
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"--wandb {view.entity}/{view.project}: W&B did not save the view ({reason}); log in with `wandb login`, "
            "or leave out --wandb for the same page as a file."
        ) from error


def _packages() -> tuple[Any, Any]:
    """wandb-workspaces, which only this view needs."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise InputError(
            "--wandb needs the package wandb-workspaces; `pip install wandb-workspaces`, or leave out --wandb for "
            "the same page as a file."
        ) from error
    return ws, wr
