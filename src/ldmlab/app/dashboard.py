"""Runs side by side as one HTML page: configurations, curves, the trade-off over factors, newest images."""

import base64
import io
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from PIL import Image

from ldmlab.app.run_records import RunRecord, by_configuration
from ldmlab.report.line_chart import COLOURS, Points, line_chart
from ldmlab.report.report_html import page
from ldmlab.report.score_names import number_text

STAGES = {  # in the order of the flow: title and the numbers that lead
    "autoencoder": ("First stages", ("psnr", "ssim", "lpips", "fid", "rfid")),
    "clip": ("Text and image encoders", ("recall_1_of_50",)),
    "classifier": ("Classifiers of latents", ("accuracy", "loss")),
    "diffusion": ("Denoisers", ("fid", "kid", "clip_distance", "loss")),
}
_IMAGE_PX = (320, 192)  # longest side inside the page; the second where there are many
_MANY_IMAGES = 24
_MOST_CHARTS = 12  # of one stage
_SEEN = ("val/", "in_training/")  # measured on images that were not trained on


def metrics_of(runs: Sequence[RunRecord], stage: str) -> list[str]:
    """Held-out numbers and scores in training that are one number a model, the telling ones first."""
    leading = [prefix + name for prefix in _SEEN for name in STAGES[stage][1]]
    names = {name for run in runs for name in run.curves if name.startswith(_SEEN) and name.count("/") == 1}
    names = {name for name in names if "chance" not in name}
    ordered = [*(name for name in leading if name in names), *sorted(names - set(leading))]
    training = [name for name in ("loss", "reconstruction") if any(name in run.curves for run in runs)]
    return [*ordered[: _MOST_CHARTS - len(training)], *training]


def is_seen(metric: str) -> bool:
    """Whether a number is measured on images that were not trained on."""
    return metric.startswith(_SEEN)


def _shown(metric: str) -> str:
    """In a table's head; a score in training is no score of evaluate.py, which stands there too."""
    head, _, name = metric.partition("/")
    return {"held_out": name, "in_training": f"{name} in training"}.get(head, metric)


def by_stage(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Runs of each stage, in the order of the flow."""
    found = {stage: [run for run in runs if run.stage == stage] for stage in STAGES}
    return {stage: members for stage, members in found.items() if members}


def dashboard(runs: Sequence[RunRecord], title: str = "Runs side by side") -> str:
    """The page."""
    sections = []
    for stage, members in by_stage(runs).items():
        metrics, labels = metrics_of(members, stage), by_configuration(members)
        content = _table(labels, metrics) + _charts(labels, metrics) + _tradeoff(members, metrics)
        sections.append(f"<section><h2>{escape(STAGES[stage][0])}</h2>{content}</section>")
    sections += [_images(runs), _runs(runs)]
    groups = sorted({run.group for run in runs})
    return page(title, f"{len(runs)} runs of {', '.join(groups)}.", sections)


def _table(labels: Mapping[str, list[RunRecord]], metrics: Sequence[str]) -> str:
    """One line a configuration: the newest numbers, mean and standard deviation over its runs."""
    scores = sorted({name for members in labels.values() for run in members for name in run.scores})
    columns = [name for name in metrics if is_seen(name)] + scores
    head = "".join(f"<th>{escape(_shown(name))}</th>" for name in columns)
    body = ""
    for label, members in labels.items():
        cells = "".join(f"<td>{_mean(members, name)}</td>" for name in columns)
        body += f"<tr><td>{escape(label)}</td><td>{len(members)}</td>{cells}</tr>"
    table = f'<table class="numbers"><tr><th>configuration</th><th>runs</th>{head}</tr>{body}</table>'
    return f'<div style="overflow-x:auto">{table}</div>'


def _mean(members: Sequence[RunRecord], name: str) -> str:
    values = [value for run in members if (value := run.last(name)) is not None]
    if not values:
        return "–"
    return number_text(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _charts(labels: Mapping[str, list[RunRecord]], metrics: Sequence[str]) -> str:
    """One chart a number, one line a configuration; more lines than colours go to further charts."""
    figures = []
    for metric in metrics:
        lines = {label: mean for label, members in labels.items() if (mean := mean_curve(members, metric))}
        names = list(lines)
        for start in range(0, len(names), len(COLOURS)):
            part = names[start : start + len(COLOURS)]
            more = f" ({start + 1}–{start + len(part)} of {len(names)})" if len(names) > len(COLOURS) else ""
            figures.append(line_chart({name: lines[name] for name in part}, title=metric + more))
    return f'<div class="charts">{"".join(figures)}</div>'


def mean_curve(members: Sequence[RunRecord], metric: str) -> Points:
    """The mean over the runs that have the number, at the steps that all of them have."""
    curves = [dict(run.curves[metric]) for run in members if run.curves.get(metric)]
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    return [(step, statistics.fmean(curve[step] for curve in curves)) for step in steps]


def _tradeoff(members: Sequence[RunRecord], metrics: Sequence[str]) -> str:
    """The newest held-out numbers over the downsampling factor, where there are several factors."""
    if len({run.fields["downsampling"] for run in members} - {None}) < 2:
        return ""
    scores = sorted({name for run in members for name in run.scores})
    figures = []
    for metric in [*filter(is_seen, metrics), *scores]:
        lines: dict[str, list[tuple[float, float]]] = {}
        for label, some in by_configuration(_simple(members), without="downsampling").items():
            values: dict[int, list[float]] = defaultdict(list)
            for run in some:
                if run.fields["downsampling"] and (value := run.last(metric)) is not None:
                    values[run.fields["downsampling"]].append(value)
            lines[label] = [(factor, statistics.fmean(values[factor])) for factor in sorted(values)]
        shown = {name: points for name, points in list(lines.items())[: len(COLOURS)] if points}
        figures.append(line_chart(shown, title=metric, x_title="downsampling factor"))
    return f'<h3>Over the downsampling factor</h3><div class="charts">{"".join(figures)}</div>'


def _simple(members: Sequence[RunRecord]) -> list[RunRecord]:
    """Latent channels, codes and parameters follow the factor: they do not cut the line over it."""
    follows = dict.fromkeys(("latent_channels", "codebook_size", "parameters"))
    return [replace(run, fields=run.fields | follows) for run in members]


def _images(runs: Sequence[RunRecord]) -> str:
    """The newest grid of every panel of every run, made small."""
    blocks = []
    found = [(run, name, path) for run in runs for name, path in run.images().items()]
    side = _IMAGE_PX[len(found) > _MANY_IMAGES]
    for run, name, path in found:
        image = f'<div><img alt="{escape(name)}" src="{_small(path, side)}"></div>'
        words = f"{escape(run.path.name)}<br>{escape(name)}, step {int(path.stem.rpartition('_')[2])}"
        blocks.append(f'<figure class="card">{image}<figcaption>{words}</figcaption></figure>')
    return (
        f'<section><h2>Newest images</h2><div class="cards pairs">{"".join(blocks)}</div></section>' if blocks else ""
    )


def _small(path: Path, side: int) -> str:
    image = Image.open(path).convert("RGB")
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "webp", quality=75)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _runs(runs: Sequence[RunRecord]) -> str:
    """Every run with the fields it is compared by."""
    names = list(dict.fromkeys(name for run in runs for name in run.fields))
    head = "".join(
        f"<th>{escape(name.replace('_', ' '))}</th>" for name in ("run", "group", "stage", "seed", *names, "step")
    )
    body = ""
    for run in runs:
        state = "finished" if run.finished else f"of {run.max_steps}"
        cells = [
            run.path.name,
            run.group,
            run.stage,
            run.seed,
            *(run.fields[name] for name in names),
            f"{run.step} {state}",
        ]
        body += f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>"
    table = f'<table class="numbers"><tr>{head}</tr>{body}</table>'
    return f'<section><h2>Every run</h2><div style="overflow-x:auto">{table}</div></section>'


def _text(cell: object) -> str:
    if cell is None:
        return "–"
    return f"{cell:,}" if isinstance(cell, int) else escape(str(cell))
