"""Runs at W&B: scores of evaluate.py in the run of their model, and the page of dashboard_page.py as a saved view."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.app.dashboard_page import STAGES, UNSEEN, by_stage, metrics_of, score_names
from ldmlab.app.run_records import RunRecord, comparison_fields, scores_of
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_config, read_description
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB


def send_scores(run_folder: Path, out: Path | None = None) -> None:
    """The run's evaluations, and one elsewhere, as evaluation/FOLDER/SCORE to its W&B run if any; never an error."""
    try:
        _send(run_folder, out)
    except Exception as error:  # no network, no account, no wandb: the score is not lost for that
        place, reason = out or run_folder, _first_line(error)
        distributed.say(f"W&B did not take the scores ({reason}); they are in {place}, and go with the next ones.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _send(run_folder: Path, out: Path | None) -> None:
    if not (run_folder / "config.yaml").exists() or not (run_folder / "provenance.json").exists():
        return
    config, target = read_config(run_folder), f"{WandB.__module__}.{WandB.__qualname__}"
    nodes = {name: node for name, node in (config.get("logger") or {}).items() if node}
    used = [name for name, node in nodes.items() if node.get("_target_") == target and node.get("mode") != "disabled"]
    if not used:
        return
    logger: WandB = instantiate(nodes[used[0]], where=f"logger.{used[0]}")
    values = {name: value for name, (value, _) in scores_of(run_folder).items()}
    if out is not None and not out.resolve().is_relative_to((run_folder / "evaluation").resolve()):
        found = read_evaluation(out)["scores"]
        values |= {f"{out.name}/{name}": score["value"] for name, score in found.items()}
    run = RunFolder(run_folder, json.loads((run_folder / "provenance.json").read_text())["run_id"])
    try:
        run.lock()
    except InputError:  # two processes in one W&B run would overwrite each other
        waiting = "its W&B run gets these scores with those of the next evaluation"
        distributed.say(f"{run_folder} is still training; {waiting}.")
        return
    try:
        settings = {**config, **comparison_fields(read_description(run_folder))}
        logger.send_scores(run, settings, {f"evaluation/{name}": value for name, value in values.items()})
    finally:
        run.close()


def workspace(runs: Sequence[RunRecord], entity: str, project: str, title: str) -> Any:
    """A view that is not saved yet: a section a stage, configurations together, seeds as mean and spread."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise InputError(
            "--wandb needs the package wandb-workspaces; `pip install wandb-workspaces`, or leave out --wandb for "
            "the same page as a file."
        ) from error
    sections = [
        ws.Section(name=STAGES[stage][0], panels=_panels(wr, stage, members), is_open=True)
        for stage, members in by_stage(runs).items()
    ]
    names = sorted({name for run in runs for name in run.images()})
    images: list[Any] = [wr.MediaBrowser(title=name, media_keys=[name], num_columns=4) for name in names]
    if images:
        sections.append(ws.Section(name="Newest images", panels=images, is_open=True))
    columns = ("downsampling", "first_stage_kind", "latent_channels", "codebook_size", "parameters")
    return ws.Workspace(
        name=title,
        entity=entity,
        project=project,
        sections=sections,
        runset_settings=ws.RunsetSettings(
            filters=ws.And(ws.Metric("Group").isin(sorted({run.group for run in runs}))),
            groupby=[ws.Metric("JobType"), ws.Config("downsampling"), ws.Config("first_stage_kind")],
            pinned_columns=[f"config:{name}" for name in columns],
        ),
        settings=ws.WorkspaceSettings(max_runs=max(10, min(len(runs), 100))),
    )


def _panels(wr: Any, stage: str, members: Sequence[RunRecord]) -> list[Any]:
    """Curves of the stage's metrics, bars of evaluate.py's scores, one number a run, and both over the factor."""
    metrics, scores = metrics_of(members, stage), [f"evaluation/{name}" for name in score_names(members)]
    spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stddev"}
    panels = [wr.LinePlot(title=name, x="Step", y=[name], **spread) for name in metrics]
    panels += [wr.BarPlot(title=name, metrics=[name]) for name in scores]
    if len({run.fields["downsampling"] for run in members} - {None}) > 1:
        for name in [*(name for name in metrics if name.startswith(UNSEEN)), *scores]:
            axes = {"x": wr.Config("downsampling"), "y": wr.SummaryMetric(name), "log_x": True}
            panels.append(wr.ScatterPlot(title=f"{name} over the downsampling factor", **axes))
    return panels


def save_view(view: Any) -> str:
    """Save it under the account that is logged in; its address."""
    import wandb

    try:
        return str(view.save().url)
    except (wandb.Error, ValueError, OSError) as error:  # no account, no network, no such project
        raise InputError(
            f"--wandb {view.entity}/{view.project}: W&B did not save the view ({_first_line(error)}); log in with "
            "`wandb login`, or leave out --wandb for the same page as a file."
        ) from error
