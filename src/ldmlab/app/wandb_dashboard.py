"""The page of dashboard.py as a saved view at W&B: the same sections and charts over the runs of the same groups."""

from collections.abc import Sequence
from typing import Any

from ldmlab.app.dashboard import STAGES, by_stage, is_seen, metrics_of
from ldmlab.app.run_records import RunRecord
from ldmlab.errors import InputError

_COLUMNS = ("downsampling", "first_stage_kind", "latent_channels", "codebook_size", "parameters")


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
            for name in [*filter(is_seen, metrics), *scores]
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
