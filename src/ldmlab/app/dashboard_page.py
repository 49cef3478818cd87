"""Comparison of runs, as one HTML page or as a saved view at W&B: configurations, curves, scores, newest images."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ldmlab import distributed
from ldmlab.app.run_records import RunRecord, by_configuration, comparison_fields, scores_of
from ldmlab.errors import InputError, first_line
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_config, read_description
from ldmlab.report.line_chart import COLOURS, Chart, Points
from ldmlab.report.metrics_json import read_evaluation
from ldmlab.report.page_content import DASH, Block, Card, Charts, Gallery, Page, Row, Section, Table
from ldmlab.report.score_lines import score_text
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB

STAGES = {  # in the order of the flow: title and the metrics that lead
    "autoencoder": ("First stages", ("psnr", "ssim", "lpips", "fid", "rfid")),
    "clip": ("Text and image encoders", ("recall_1_of_50",)),
    "classifier": ("Classifiers of latents", ("accuracy", "loss")),
    "diffusion": ("Denoisers", ("fid", "kid", "clip_distance", "loss")),
}
_IMAGE_PX = (320, 192)  # longest side inside the page; the second where there are many
_MANY_IMAGES = 24
_MOST_CHARTS = 12  # of one stage
_DEVIATIONS = ("psnr_std", "ssim_std", "lpips_std", "psim_std")  # of a mean that is shown
UNSEEN = ("val/", "in_training/")  # measured on images that were not trained on


def metrics_of(runs: Sequence[RunRecord], stage: str) -> list[str]:
    """Validation metrics and scores in training that are one number per model, the most informative first."""
    leading = [prefix + name for prefix in UNSEEN for name in STAGES[stage][1]]
    names = {name for run in runs for name in run.curves if name.startswith(UNSEEN) and name.count("/") == 1}
    names = {name for name in names if "chance" not in name and not name.endswith(_DEVIATIONS)}
    ordered = [*(name for name in leading if name in names), *sorted(names - set(leading))]
    training = [name for name in ("loss", "reconstruction") if any(name in run.curves for run in runs)]
    return [*ordered[: _MOST_CHARTS - len(training)], *training]


def score_names(runs: Sequence[RunRecord]) -> list[str]:
    """Scores of evaluate.py that any of the runs has."""
    return sorted({name for run in runs for name in run.scores})


def by_stage(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    found = {stage: [run for run in runs if run.stage == stage] for stage in STAGES}
    return {stage: members for stage, members in found.items() if members}


def dashboard(runs: Sequence[RunRecord], title: str = "Runs side by side") -> Page:
    sections = []
    for stage, members in by_stage(runs).items():
        metrics, labels = metrics_of(members, stage), by_configuration(members)
        blocks = [_table(labels, metrics), *_charts(labels, metrics), *_over_factors(members, metrics)]
        sections.append(Section(STAGES[stage][0], blocks))
    sections += [Section("Newest images", _images(runs)), Section("Every run", [_runs(runs)])]
    groups = sorted({run.group for run in runs})
    return Page(title, f"{len(runs)} run{'s' * (len(runs) > 1)} of {', '.join(groups)}.", sections)


def _titles(runs: Sequence[RunRecord]) -> dict[str, str]:
    return {name: title for run in runs for name, title in run.titles.items()}


def _table(labels: Mapping[str, list[RunRecord]], metrics: Sequence[str]) -> Table:
    """One line a configuration: the newest numbers, mean and standard deviation over its runs."""
    runs = [run for members in labels.values() for run in members]
    titles = _titles(runs)
    columns = [name for name in metrics if name.startswith(UNSEEN)] + score_names(runs)
    rows = tuple(
        Row("theirs", label, (str(len(members)), *(_mean(members, name) for name in columns)))
        for label, members in labels.items()
    )
    return Table("", ("runs", *(titles.get(name, name) for name in columns)), rows, (), "configuration")


def _mean(members: Sequence[RunRecord], name: str) -> str:
    values = [value for run in members if (value := run.last(name)) is not None]
    if not values:
        return DASH
    spread = statistics.stdev(values) if len(values) > 1 else None
    return score_text(name.rpartition("/")[2], statistics.fmean(values), spread)


def _charts(labels: Mapping[str, list[RunRecord]], metrics: Sequence[str]) -> list[Block]:
    """One chart a metric, one line a configuration; more lines than colours go to further charts."""
    charts = []
    titles = _titles([run for members in labels.values() for run in members])
    for metric in metrics:
        lines = {label: mean for label, members in labels.items() if (mean := mean_curve(members, metric))}
        names = list(lines)
        for start in range(0, len(names), len(COLOURS)):
            part = names[start : start + len(COLOURS)]
            more = f" ({start + 1}–{start + len(part)} of {len(names)})" if len(names) > len(COLOURS) else ""
            if chart := Chart(titles.get(metric, metric) + more, {name: lines[name] for name in part}):
                charts.append(chart)
    return [Charts(charts)] if charts else []


def mean_curve(members: Sequence[RunRecord], metric: str) -> Points:
    """The mean over the runs that have the metric, at the steps that all of them have."""
    curves = [dict(run.curves[metric]) for run in members if run.curves.get(metric)]
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]


def _over_factors(members: Sequence[RunRecord], metrics: Sequence[str]) -> list[Block]:
    """The newest validation metrics and scores over the downsampling factor, where there are several factors."""
    factors = {run.fields["downsampling"] for run in members} - {None}
    if len(factors) < 2:
        return []
    titles, charts = _titles(members), []
    follows = dict.fromkeys(("latent_channels", "codebook_size", "parameters"))  # the factor: they do not cut its line
    groups = by_configuration([replace(run, fields=run.fields | follows) for run in members], without="downsampling")
    for metric in [*(name for name in metrics if name.startswith(UNSEEN)), *score_names(members)]:
        lines: dict[str, Points] = {}
        for label, some in groups.items():
            values: dict[int, list[float]] = defaultdict(list)
            for run in some:
                if run.fields["downsampling"] and (value := run.last(metric)) is not None:
                    values[run.fields["downsampling"]].append(value)
            lines[label] = [(factor, statistics.fmean(values[factor])) for factor in sorted(values)]
        shown = {name: points for name, points in list(lines.items())[: len(COLOURS)] if points}
        ticks = tuple(sorted(factors))
        if chart := Chart(titles.get(metric, metric), shown, "downsampling factor", log_x=True, x_ticks=ticks):
            charts.append(chart)
    return [Charts(charts, title="Over the downsampling factor")] if charts else []


def _images(runs: Sequence[RunRecord]) -> list[Block]:
    """The newest grid of every panel of every run, made small."""
    cards = []
    for run in runs:
        for name, path in run.images().items():
            step = int(path.stem.rpartition("_")[2])
            image = (str(path.relative_to(run.path)), name)
            cards.append(Card((image,), f"{run.path.name}: {name}, step {step}", folder=run.path))
    pixels = _IMAGE_PX[len(cards) > _MANY_IMAGES]
    return [Gallery(runs[0].path, tuple(cards), "pairs", pixels=pixels)] if cards else []


def _runs(runs: Sequence[RunRecord]) -> Table:
    names = list(dict.fromkeys(name for run in runs for name in run.fields))
    rows = []
    for run in runs:
        state = "finished" if run.finished else f"of {run.max_steps}"
        cells = (run.group, run.stage, str(run.seed), *(run.fields[name] for name in names), f"{run.step} {state}")
        texts = (DASH if c is None else f"{c:,}" if isinstance(c, int) else str(c) for c in cells)
        rows.append(Row("theirs", run.path.name, tuple(texts)))
    heads = (name.replace("_", " ") for name in ("group", "stage", "seed", *names, "step"))
    return Table("", tuple(heads), tuple(rows), (), "run")


def send_scores(run_folder: Path, out: Path | None = None) -> None:
    """The run's evaluations, and one elsewhere, as evaluation/FOLDER/SCORE to its W&B run if any; never an error."""
    try:
        _send(run_folder, out)
    except Exception as error:  # no network, no account, no wandb: the score is not lost for that
        place, reason = out or run_folder, first_line(error)
        distributed.say(f"W&B did not take the scores ({reason}); they are in {place}, and go with the next ones.")


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
            f"--wandb {view.entity}/{view.project}: W&B did not save the view ({first_line(error)}); log in with "
            "`wandb login`, or leave out --wandb for the same page as a file."
        ) from error
