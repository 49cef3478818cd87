"""The page of the downsampling comparison: the paper's figures 6 and 7, and costs, from the folders of a sweep."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError
from ldmlab.files import write_text
from ldmlab.report.line_chart import COLOURS, Chart
from ldmlab.report.render import markdown, write_page
from ldmlab.report.rows import THUMBNAIL, Block, Card, Charts, Fold, Gallery, Page, Row, Section, Table, Text
from ldmlab.report.score_lines import by_features, described, number_text
from ldmlab.report.tradeoff_jobs import (
    PETA,
    Curve,
    EqualBudget,
    FactorJobs,
    X,
    by_factor,
    by_length,
    check_complete,
    check_one_measure,
    equal_budget,
    is_job,
    read_job,
)

_SHOWN_IMAGES = 8  # of a row

Axis = tuple[str, X]  # unit, place of a point
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
        lambda job, point: (job["forward"] * point["sampler_steps"] * _calls(job) + job["decoder"]) / 1e9,
    ),
    "sampler steps": ("steps", lambda _, point: point["sampler_steps"]),
}
_COLOURS = {f"f{2**n}": COLOURS[n] for n in range(6)}  # a factor has the same colour on every chart


def _calls(job: Mapping[str, Any]) -> int:
    """Evaluations of the network a step: two with guidance."""
    return 1 if job["protocol"].get("guidance_scale") in (None, 1, 1.0) else 2


def write_tradeoff(folders: Sequence[Path], out: Path) -> Path:
    """report.html, report.md, points.csv of the jobs in `folders`, charts.csv of the curves; the path of the page."""
    jobs = [read_job(folder) for folder in folders if is_job(folder)]
    left_out = [folder for folder in folders if not is_job(folder)]
    if not jobs:
        raise InputError(f"{folders[0]} holds no scored job of a comparison; let the sweep finish one first.")
    for job in jobs:
        check_complete(job)
    check_one_measure(jobs)
    page = tradeoff_page(jobs, left_out)
    write_text(out / "report.md", markdown(page))
    write_text(out / "points.csv", jobs_csv(jobs))
    return write_page(out / "report.html", page, points="charts.csv")


def tradeoff_page(jobs: Sequence[Mapping[str, Any]], left_out: Sequence[Path] = ()) -> Page:
    """Results at equal cost, then each kind of budget, then images."""
    budgets = sorted({job["budget"] for job in jobs}, reverse=True)
    groups = {budget: by_factor([job for job in jobs if job["budget"] == budget]) for budget in budgets}
    sections = _equal_sections([factor for factors in groups.values() for factor in factors])
    for budget, factors in groups.items():
        sections += _sections(factors, budget)
    lead = f"{len(jobs)} jobs, each a factor with all its stages, scored by the protocol {jobs[0]['protocol']['name']}."
    if left_out:
        lead += f" Not scored yet, so left out: {', '.join(folder.name for folder in left_out)}."
    return Page("Downsampling comparison", lead, [*sections, Section("Images", _images(jobs))])


def scores_of(factors: Sequence[FactorJobs]) -> list[str]:
    """The scores that the jobs hold, the Fréchet distance first."""
    found = dict.fromkeys(name for f in factors for job in f.jobs for p in job["points"] for name in p["scores"])
    return sorted(found, key=lambda name: (name != "fid", name != "kid"))


def _described(factors: Sequence[FactorJobs], score: str) -> tuple[str, str]:
    """Title by the network of the features, and direction (lower where none is known)."""
    points = [point for f in factors for job in f.jobs for point in job["points"] if score in point["scores"]]
    title, direction, _ = described(score, points[0]["scores"][score])
    features = str(points[0]["scored_by"]["features"].get("name"))
    return by_features(title, features), "lower" if direction == "info" else direction


def ranking(factors: Sequence[FactorJobs]) -> str:
    """One sentence on the order of the factors at the end of training."""
    score = scores_of(factors)[0]
    ends = {f.label: value for f in factors if (value := f.final(score)) is not None}
    shown, direction = _described(factors, score)
    ranked = sorted(ends, key=lambda label: ends[label].mean, reverse=direction == "higher")
    if len(ranked) < 2:
        return f"{shown}: {ranked[0]} ends at {ends[ranked[0]]}." if ranked else f"{shown}: no run has a last score."
    return f"{shown} at the end of training, best first: {', '.join(f'{label} {ends[label]}' for label in ranked)}."


def _equal_budgets(factors: Sequence[FactorJobs], score: str) -> dict[str, EqualBudget]:
    """By the title of the axis; with one device wall-clock time is left out, since it equals device time."""
    axes = {title: x for title, (_, x) in TRAINING.items() if title != "wall-clock"}
    return {title: found for title, x in axes.items() if (found := equal_budget(factors, score, x))}


def _amount(value: float) -> str:
    """Without an exponent from 1e-4 to the paper's runs."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _equal_sections(factors: Sequence[FactorJobs]) -> list[Section]:
    """Results at equal cost, from the runs of every length; none where no cost is shared."""
    main = scores_of(factors)[0]
    budgets = _equal_budgets(factors, main)
    if not budgets:
        return []
    shown, direction = _described(factors, main)
    blocks: list[Block] = []
    for name, found in budgets.items():
        order = ", ".join(f"{label} {number_text(found.scores[label])}" for label in found.best_first(direction))
        spent = f"{_amount(found.spent)} {TRAINING[name][0]}"
        blocks.append(Text(f"{shown} at equal {name} ({spent}), best first: {order}."))
    blocks.append(Text("Between the points of a curve scores are interpolated on a logarithmic axis."))
    heads = tuple(f"{shown} at {_amount(found.spent)} {TRAINING[name][0]}" for name, found in budgets.items())
    labels = next(iter(budgets.values())).scores
    cells = {label: tuple(number_text(found.scores[label]) for found in budgets.values()) for label in labels}
    blocks.append(Table("", heads, tuple(Row("theirs", label, cells[label]) for label in labels), (), "factor"))
    if len({f.first["budget"] for f in factors}) > 1:  # one kind has these figures below
        charts = [
            _chart(by_length(factors, main, x), f"{shown} against {name}, all runs", unit)
            for name, (unit, x) in TRAINING.items()
            if name != "wall-clock"
        ]
        blocks.append(Charts([chart for chart in charts if chart]))
    return [Section("At equal cost", blocks)]


def _sections(factors: Sequence[FactorJobs], budget: str) -> list[Section]:
    main, *others = scores_of(factors)
    head = f"Budgets equal in {budget}"
    shown = {score: _described(factors, score)[0] for score in (main, *others)}
    sections = [Section(head, [Text(ranking(factors)), table(factors)])]
    sections.append(Section(f"{head}: {shown[main]} over training and sampling", _charts(factors, main)))
    for score in others:
        sections.append(Section(f"{head}: {shown[score]}", [Fold("Charts and numbers", _charts(factors, score))]))
    return sections


def _charts(factors: Sequence[FactorJobs], score: str) -> list[Block]:
    """Every figure of one score; lines are means over seeds, the table below has the deviations."""
    shown = _described(factors, score)[0]
    charts, rows = [], []
    for axes, curve_of in ((TRAINING, FactorJobs.training_curve), (SAMPLING, FactorJobs.sampling_curve)):
        for title, (unit, x) in axes.items():
            curves = {f.label: curve for f in factors if (curve := curve_of(f, score, x))}
            points = {label: [(at, value.mean) for at, value in curve] for label, curve in curves.items()}
            charts.append(_chart(points, f"{shown} against {title}", unit))
            rows += [Row("theirs", title, (label, _numbers(curve))) for label, curve in curves.items()]
    charts.append(_reconstruction(factors, score))
    numbers = Table("", ("factor", "x: score, mean ± deviation over seeds"), tuple(rows), (), "figure", True)
    return [Charts([chart for chart in charts if chart]), Fold("Numbers", [numbers])]


def _numbers(curve: Curve) -> str:
    return "; ".join(f"{at:.4g}: {value}" for at, value in curve)


def _chart(points: Mapping[str, Any], title: str, unit: str) -> Chart:
    return Chart(title, points, unit, log_x=True, reserved=_COLOURS)


def _reconstruction(factors: Sequence[FactorJobs], score: str) -> Chart:
    """One point a factor: quality of the first stage's reconstructions, and of samples."""
    points = {
        f.label: [(lost, final.mean)]
        for f in factors
        if (lost := f.reconstruction(score)) is not None and (final := f.final(score)) is not None
    }
    title = f"{_described(factors, score)[0]}: generation against reconstruction"
    return Chart(title, points, "of reconstructions", reserved=_COLOURS)


def table(factors: Sequence[FactorJobs]) -> Table:
    """Description, cost and final scores of each factor."""
    scores = scores_of(factors)
    heads = ("latent", "parameters", "GFLOPs forward", "steps", "1e15 FLOPs", "hours", "first stage PSNR")
    rows = []
    for f in factors:
        job, last = f.first, f.first["points"][0]
        last = next((p for p in job["points"] if p["step"] == job["max_steps"]), last)
        hours = "–" if last["seconds"] is None else f"{last['seconds'] / 3600:.3g}"
        lost = [f.reconstruction(name) for name in ("psnr", "fid")]
        cells = (
            *(" x ".join(map(str, job["latent"])), f"{job['parameters'] / 1e6:.1f} M"),
            *(f"{job['forward'] / 1e9:.3g}", f"{job['max_steps']:,}", _amount(last["flops"] / PETA), hours),
            *("–" if value is None else number_text(value) for value in lost),
            *(str(f.final(name) or "–") for name in scores),
            str(len(f.jobs)),
        )
        rows.append(Row("theirs", f.label, cells))
    titles = [_described(factors, name)[0] for name in scores]
    return Table("", (*heads, "first stage distance", *titles, "seeds"), tuple(rows), (), "factor")


def jobs_csv(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Every point of every job, for other plotting tools."""
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


# ---- images


def _images(jobs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Reconstructions of each first stage, and the last samples of each job; nothing where none were kept."""
    blocks: list[Block] = []
    seen = set()
    for job in sorted(jobs, key=lambda found: (found["downsampling"], found["max_steps"], found["seed"])):
        name, first_stage = f"f{job['downsampling']}", Path(job["first_stage"])
        if job["first_stage"] not in seen:
            blocks += _newest(
                first_stage, "tradeoff-*", ("reconstruction_*.png", "rebuilt_*.png"), f"{name}: reconstructions"
            )
        seen.add(job["first_stage"])
        usual = job["points"][0]["sampler_steps"]
        label = f"{name}: samples after {job['max_steps']:,} steps" + (f", seed {job['seed']}" if job["seed"] else "")
        blocks += _newest(Path(job["folder"]), f"step_{job['max_steps']:08d}-{usual}-*", ("sample_*.png",), label)
    return blocks


def _newest(run: Path, evaluation: str, patterns: Sequence[str], label: str) -> list[Block]:
    """A row of images of the latest of a run's evaluations of that name, in any folder."""
    found = sorted(run.glob(f"evaluation/{evaluation}"), key=lambda folder: folder.stat().st_mtime)
    if not found:
        return []
    kept = sorted(path for pattern in patterns for path in found[-1].glob(f"*s/{pattern}"))
    shown = kept[:: max(len(kept) // _SHOWN_IMAGES, 1)][:_SHOWN_IMAGES]  # neighbours in the set look alike
    cards = tuple(Card(((str(path.relative_to(found[-1])), ""),)) for path in shown)
    return [Gallery(found[-1], cards, "thumbnails", label, THUMBNAIL)] if cards else []
