"""The page of the downsampling comparison: the paper's figures 6 and 7, and costs, from the folders of a sweep."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ldmlab.checkpoints import write_atomically
from ldmlab.errors import InputError
from ldmlab.report.equal_budgets import EqualBudget, equal_budget, merged
from ldmlab.report.line_chart import COLOURS, line_chart
from ldmlab.report.report import MEANING
from ldmlab.report.report_html import page
from ldmlab.report.score_names import number_text
from ldmlab.report.trade_curves import PETA, Curve, FactorJobs, by_factor, check_one_measure, is_job, read_job
from ldmlab.report.trade_images import image_rows

Axis = tuple[str, Callable[[Mapping[str, Any], Mapping[str, Any]], float | None]]
TRAINING: dict[str, Axis] = {
    "training steps": ("steps", lambda _, point: point["step"]),
    "wall-clock": ("hours", lambda _, point: point["seconds"] and point["seconds"] / 3600),
    "device time": ("device-hours", lambda job, p: p["seconds"] and p["seconds"] * job["processes"] / 3600),
    "training compute": ("1e15 FLOPs", lambda _, point: point["flops"] / PETA),
}
SAMPLING: dict[str, Axis] = {
    "sampling time": (
        "seconds an image",
        lambda job, point: job["seconds_per_image"].get(str(point["sampler_steps"])),
    ),
    "sampling compute": (
        "1e9 FLOPs an image",
        lambda job, point: (job["forward"] * point["sampler_steps"] * _asked(job) + job["decoder"]) / 1e9,
    ),
    "sampler steps": ("steps", lambda _, point: point["sampler_steps"]),
}
_COLOURS = {f"f{2**n}": COLOURS[n] for n in range(6)}  # a factor looks the same on every chart


def _asked(job: Mapping[str, Any]) -> int:
    """Evaluations of the network a step: two with guidance."""
    return 1 if job["protocol"].get("guidance_scale") in (None, 1, 1.0) else 2


def write_tradeoff(folders: Sequence[Path], out: Path) -> Path:
    """report.html, report.md and points.csv of the jobs in `folders`; the path of the page."""
    jobs = [read_job(folder) for folder in folders if is_job(folder)]
    left_out = [folder for folder in folders if not is_job(folder)]
    if not jobs:
        raise InputError(f"{folders[0]} holds no scored job of a comparison; let the sweep finish one first.")
    check_one_measure(jobs)
    out.mkdir(parents=True, exist_ok=True)
    lines = ["# Downsampling comparison", ""]
    budgets = sorted({job["budget"] for job in jobs}, reverse=True)
    groups = {budget: by_factor([job for job in jobs if job["budget"] == budget]) for budget in budgets}
    every = [factor for factors in groups.values() for factor in factors]
    sections = _equal_sections(every)
    if equal := equal_table(every, scores_of(every)[0]):
        lines += ["## At equal cost", "", *equal_readings(every), "", *_markdown(equal), ""]
    for budget, factors in groups.items():
        sections += _sections(factors, budget)
        lines += [f"## Budgets equal in {budget}", "", reading(factors), "", *_markdown(table(factors)), ""]
    lead = f"{len(jobs)} jobs, each a factor with all its stages, scored by the protocol {jobs[0]['protocol']['name']}."
    if left_out:
        lead += f" Not scored yet, so left out: {', '.join(folder.name for folder in left_out)}."
    if images := image_rows(jobs):
        sections.append(_block("Images", images))
    _write(out / "report.html", page("Downsampling comparison", lead, sections))
    _write(out / "report.md", "\n".join([*lines[:2], lead, "", *lines[2:]]))
    _write(out / "points.csv", points_csv(jobs))
    return out / "report.html"


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _text(temporary, text))


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def scores_of(factors: Sequence[FactorJobs]) -> list[str]:
    """The scores that the jobs hold, the Fréchet distance first."""
    found = dict.fromkeys(name for f in factors for job in f.jobs for p in job["points"] for name in p["scores"])
    return sorted(found, key=lambda name: (name != "fid", name != "kid"))


def reading(factors: Sequence[FactorJobs]) -> str:
    """One sentence on which factor ends best."""
    score = scores_of(factors)[0]
    ends = {f.label: value for f in factors if (value := f.final(score)) is not None}
    shown, direction, _ = MEANING.get(score, (score, "lower", ""))
    ranked = sorted(ends, key=lambda label: ends[label].mean, reverse=direction == "higher")
    if len(ranked) < 2:
        return f"{shown}: {ranked[0]} ends at {ends[ranked[0]]}."
    return f"{shown} at the end of training, best first: {', '.join(f'{label} {ends[label]}' for label in ranked)}."


def _equal_budgets(factors: Sequence[FactorJobs], score: str) -> dict[str, EqualBudget]:
    """By the title of the axis; one device's wall-clock says nothing beside device time."""
    axes = {title: x for title, (_, x) in TRAINING.items() if title != "wall-clock"}
    return {title: found for title, x in axes.items() if (found := equal_budget(factors, score, x))}


def _amount(value: float) -> str:
    """A number that stays readable from a test to the paper's runs."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def equal_readings(factors: Sequence[FactorJobs]) -> list[str]:
    """A sentence a kind of cost on which factor is best after spending the same."""
    score = scores_of(factors)[0]
    shown, direction, _ = MEANING.get(score, (score, "lower", ""))
    sentences = []
    for title, found in _equal_budgets(factors, score).items():
        order = ", ".join(f"{label} {number_text(found.scores[label])}" for label in found.best_first(direction))
        sentences.append(
            f"{shown} at equal {title} ({_amount(found.spent)} {TRAINING[title][0]}), best first: {order}."
        )
    return sentences


def equal_table(factors: Sequence[FactorJobs], score: str) -> list[tuple[str, ...]]:
    """Scores after the same steps, device time and compute; the head first, nothing where no cost is shared."""
    budgets = _equal_budgets(factors, score)
    if not budgets:
        return []
    shown = _shown(score)
    head = [f"{shown} at {_amount(found.spent)} {TRAINING[title][0]}" for title, found in budgets.items()]
    labels = list(next(iter(budgets.values())).scores)
    rows = [(label, *(f"{number_text(found.scores[label])}" for found in budgets.values())) for label in labels]
    return [("factor", *head), *rows]


def _equal_sections(factors: Sequence[FactorJobs]) -> list[str]:
    """What was reached at equal cost, from the runs of every length."""
    main = scores_of(factors)[0]
    if not (rows := equal_table(factors, main)):
        return []
    charts = [
        _chart(merged(factors, main, x), f"{_shown(main)} against {title}, all runs", unit)
        for title, (unit, x) in TRAINING.items()
        if title != "wall-clock" and len({f.first["budget"] for f in factors}) > 1  # one kind has these figures below
    ]
    told = "".join(f"<p>{escape(sentence)}</p>" for sentence in equal_readings(factors))
    note = "<p>Between the points of a curve scores are read off on a logarithmic axis.</p>"
    return [_block("At equal cost", f'{told}{note}{_html(rows)}<div class="charts">{"".join(charts)}</div>')]


def _sections(factors: Sequence[FactorJobs], budget: str) -> list[str]:
    main, *others = scores_of(factors)
    head = f"Budgets equal in {budget}"
    blocks = [_block(head, f"<p>{escape(reading(factors))}</p>{_html(table(factors))}")]
    blocks.append(_block(f"{head}: {_shown(main)} over training and sampling", _charts(factors, main)))
    for score in others:
        content = f"<details><summary>{escape(_shown(score))}</summary>{_charts(factors, score)}</details>"
        blocks.append(_block(f"{head}: {_shown(score)}", content))
    return blocks


def _shown(score: str) -> str:
    return str(MEANING.get(score, (score,))[0])


def _charts(factors: Sequence[FactorJobs], score: str) -> str:
    """Every figure of one score; lines are means over seeds, the deviations stand in the table beneath."""
    charts, rows = [], [("figure", "factor", "x: score, mean ± deviation over seeds")]
    for axes, curve_of in ((TRAINING, FactorJobs.training_curve), (SAMPLING, FactorJobs.sampling_curve)):
        for title, (unit, x) in axes.items():
            curves = {f.label: curve for f in factors if (curve := curve_of(f, score, x))}
            charts.append(_chart(curves, f"{_shown(score)} against {title}", unit))
            rows += [
                (title, label, "; ".join(f"{at:.4g}: {value}" for at, value in curve))
                for label, curve in curves.items()
            ]
    charts.append(_reconstruction(factors, score))
    return f'<div class="charts">{"".join(charts)}</div><details><summary>Numbers</summary>{_html(rows)}</details>'


def _chart(curves: Mapping[str, Curve], title: str, unit: str) -> str:
    points = {label: [(x, value.mean) for x, value in curve] for label, curve in curves.items()}
    return line_chart(points, title=title, x_title=unit, log_x=True, reserved=_COLOURS)


def _reconstruction(factors: Sequence[FactorJobs], score: str) -> str:
    """One point a factor: how much the first stage loses, and how good what is generated through it is."""
    points = {
        f.label: [(lost, final.mean)]
        for f in factors
        if (lost := f.reconstruction(score)) is not None and (final := f.final(score)) is not None
    }
    title = f"{_shown(score)}: generation against reconstruction"
    return line_chart(points, title=title, x_title="of reconstructions", reserved=_COLOURS)


def table(factors: Sequence[FactorJobs]) -> list[tuple[str, ...]]:
    """What each factor is, what it costs, how it ends; the head first."""
    scores = scores_of(factors)
    head = ("factor", "latent", "parameters", "GFLOPs forward", "steps", "1e15 FLOPs", "hours", "first stage PSNR")
    lines: list[tuple[str, ...]] = [(*head, "first stage FD", *map(_shown, scores), "seeds")]
    for f in factors:
        job, last = f.first, f.first["points"][0]
        last = next((p for p in job["points"] if p["step"] == job["max_steps"]), last)
        hours = "–" if last["seconds"] is None else f"{last['seconds'] / 3600:.3g}"
        lost = [f.reconstruction(name) for name in ("psnr", "fid")]
        lines.append(
            (
                *(f.label, " x ".join(map(str, job["latent"])), f"{job['parameters'] / 1e6:.1f} M"),
                *(f"{job['forward'] / 1e9:.3g}", f"{job['max_steps']:,}", f"{last['flops'] / PETA:.3g}", hours),
                *("–" if value is None else number_text(value) for value in lost),
                *(str(f.final(name) or "–") for name in scores),
                str(len(f.jobs)),
            )
        )
    return lines


def points_csv(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Every point of every job, for figures made elsewhere."""
    names = ["folder", "downsampling", "seed", "budget", "parameters", "step", "sampler_steps", "seconds", "flops"]
    scores = sorted({name for job in jobs for point in job["points"] for name in point["scores"]})
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*names, "seconds_per_image", *scores])
    for job in jobs:
        for point in job["points"]:
            both = {**job, **point}
            values = [point["scores"][name]["value"] if name in point["scores"] else "" for name in scores]
            pace = job["seconds_per_image"].get(str(point["sampler_steps"]), "")
            writer.writerow([*(both[name] for name in names), pace, *values])
    return file.getvalue()


def _html(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows[1:])
    return f'<table class="numbers"><tr>{head}</tr>{body}</table>'


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def _block(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"
