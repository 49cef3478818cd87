"""The page of the downsampling comparison: the paper's figures 6 and 7, and costs, from the folders of a sweep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError
from ldmlab.files import write_text
from ldmlab.report.line_chart import COLOURS, Chart
from ldmlab.report.page_content import (
    DASH,
    THUMBNAIL,
    Block,
    Card,
    Charts,
    Fold,
    Gallery,
    Page,
    Row,
    Section,
    Table,
    Text,
)
from ldmlab.report.render import csv_text, write_pages
from ldmlab.report.score_lines import by_features, described, number_text
from ldmlab.report.tradeoff_jobs import (
    PETA,
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
_AT_EQUAL_COST = [name for name in TRAINING if name != "wall-clock"]  # which is device time where there is one device
SAMPLING: dict[str, Axis] = {
    "sampling time": ("seconds an image", lambda job, p: job["seconds_per_image"].get(str(p["sampler_steps"]))),
    "sampling compute": ("1e9 FLOPs an image", lambda job, point: _flops(job, point["sampler_steps"]) / 1e9),
    "sampler steps": ("steps", lambda _, point: point["sampler_steps"]),
}
_COLOURS = {f"f{2**n}": COLOURS[n] for n in range(6)}  # a factor has the same colour on every chart


def _flops(job: Mapping[str, Any], sampler_steps: int) -> float:
    """Of an image; with guidance the network is evaluated twice a step, of levels even in position in its interval."""
    low, high = job["protocol"].get("guidance_interval") or (0.0, 1.0)
    guided = high - low if job["protocol"].get("guidance_interval_unit", "position") == "position" else 1.0
    calls = 1 if job["protocol"].get("guidance_scale") in (None, 1, 1.0) else 1 + guided
    return job["forward"] * round(sampler_steps * calls) + job["decoder"]


def write_tradeoff(folders: Sequence[Path], out: Path) -> Path:
    """report.html, report.md, points.csv of the jobs in `folders`, charts.csv of the curves; the path of the page."""
    jobs = [read_job(folder) for folder in folders if is_job(folder)]
    if not jobs:
        raise InputError(f"{folders[0]} holds no scored job of a comparison; let the sweep finish one first.")
    for job in jobs:
        check_complete(job)
    check_one_measure(jobs)
    page = tradeoff_page(jobs, [folder for folder in folders if not is_job(folder)])
    write_text(out / "points.csv", jobs_csv(jobs))
    return write_pages(out, page, points="charts.csv")


def tradeoff_page(jobs: Sequence[Mapping[str, Any]], left_out: Sequence[Path] = ()) -> Page:
    """Results at equal cost, then each kind of budget, then images."""
    budgets = sorted({job["budget"] for job in jobs}, reverse=True)
    groups = {budget: by_factor([job for job in jobs if job["budget"] == budget]) for budget in budgets}
    sections = _equal_cost([factor for factors in groups.values() for factor in factors])
    for budget, factors in groups.items():
        head = f"Budgets equal in {budget}"
        main, *others = scores_of(factors)
        title = f"{head}: {_described(factors, main)[0]} over training and sampling"
        sections += [Section(head, [Text(ranking(factors)), table(factors)]), Section(title, _charts(factors, main))]
        for score in others:
            charts = Fold("Charts and numbers", _charts(factors, score))
            sections.append(Section(f"{head}: {_described(factors, score)[0]}", [charts]))
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
    point = next(p for f in factors for job in f.jobs for p in job["points"] if score in p["scores"])
    title, direction, _ = described(score, point["scores"][score])
    features = str(point["scored_by"]["features"].get("name"))
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


def _amount(value: float) -> str:
    """Without an exponent from 1e-4 to the paper's runs."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _equal_cost(factors: Sequence[FactorJobs]) -> list[Section]:
    """Results at equal cost, from the runs of every length; none where no cost is shared."""
    main = scores_of(factors)[0]
    shown, direction = _described(factors, main)
    budgets: dict[str, EqualBudget] = {}
    for name in _AT_EQUAL_COST:
        if found := equal_budget(factors, main, TRAINING[name][1]):
            budgets[name] = found
    if not budgets:
        return []
    blocks: list[Block] = []
    spent = {name: f"{_amount(found.spent)} {TRAINING[name][0]}" for name, found in budgets.items()}
    for name, found in budgets.items():
        order = ", ".join(f"{label} {number_text(found.scores[label])}" for label in found.best_first(direction))
        blocks.append(Text(f"{shown} at equal {name} ({spent[name]}), best first: {order}."))
    blocks.append(Text("Between the points of a curve scores are interpolated on a logarithmic axis."))
    rows = [
        Row("theirs", label, tuple(number_text(found.scores[label]) for found in budgets.values()))
        for label in next(iter(budgets.values())).scores
    ]
    blocks.append(Table("", [f"{shown} at {cost}" for cost in spent.values()], rows, (), "factor"))
    if len({f.first["budget"] for f in factors}) > 1:  # one kind has these figures below
        lines = {name: by_length(factors, main, TRAINING[name][1]) for name in _AT_EQUAL_COST}
        charts = [
            _chart(points, f"{shown} against {name}, all runs", TRAINING[name][0]) for name, points in lines.items()
        ]
        blocks.append(Charts([chart for chart in charts if chart]))
    return [Section("At equal cost", blocks)]


def _charts(factors: Sequence[FactorJobs], score: str) -> list[Block]:
    """Every figure of one score; lines are means over seeds, the table below has the deviations."""
    shown = _described(factors, score)[0]
    charts, rows = [], []
    for axes, curve_of in ((TRAINING, FactorJobs.training_curve), (SAMPLING, FactorJobs.sampling_curve)):
        for title, (unit, x) in axes.items():
            curves = {f.label: curve for f in factors if (curve := curve_of(f, score, x))}
            points = {label: [(at, value.mean) for at, value in curve] for label, curve in curves.items()}
            charts.append(_chart(points, f"{shown} against {title}", unit))
            for label, curve in curves.items():
                rows.append(Row("theirs", title, (label, "; ".join(f"{at:.4g}: {value}" for at, value in curve))))
    ends = {f.label: (f.reconstruction(score), f.final(score)) for f in factors}
    both = {label: [(lost, last.mean)] for label, (lost, last) in ends.items() if lost is not None and last is not None}
    title = f"{shown}: generation against reconstruction"
    charts.append(Chart(title, both, "of reconstructions", reserved=_COLOURS))
    numbers = Table("", ("factor", "x: score, mean ± deviation over seeds"), rows, (), "figure", True)
    return [Charts([chart for chart in charts if chart]), Fold("Numbers", [numbers])]


def _chart(points: Mapping[str, Any], title: str, unit: str) -> Chart:
    return Chart(title, points, unit, log_x=True, reserved=_COLOURS)


def table(factors: Sequence[FactorJobs]) -> Table:
    """Description, cost and final scores of each factor."""
    scores = scores_of(factors)
    heads = ("latent", "parameters", "GFLOPs forward", "steps", "1e15 FLOPs", "hours", "first stage PSNR")
    rows = []
    for f in factors:
        job = f.first
        last = next((p for p in job["points"] if p["step"] == job["max_steps"]), job["points"][0])
        hours = DASH if last["seconds"] is None else f"{last['seconds'] / 3600:.3g}"
        lost = [f.reconstruction(name) for name in ("psnr", "fid")]
        cells = (
            *(" x ".join(map(str, job["latent"])), f"{job['parameters'] / 1e6:.1f} M"),
            *(f"{job['forward'] / 1e9:.3g}", f"{job['max_steps']:,}", _amount(last["flops"] / PETA), hours),
            *(DASH if value is None else number_text(value) for value in lost),
            *(str(f.final(name) or DASH) for name in scores),
            str(len(f.jobs)),
        )
        rows.append(Row("theirs", f.label, cells))
    titles = [_described(factors, name)[0] for name in scores]
    return Table("", (*heads, "first stage distance", *titles, "seeds"), rows, (), "factor")


def jobs_csv(jobs: Sequence[Mapping[str, Any]]) -> str:
    """Every point of every job, for other plotting tools."""
    names = ["folder", "downsampling", "seed", "budget", "parameters", "step", "sampler_steps", "seconds", "flops"]
    scores = sorted({name for job in jobs for point in job["points"] for name in point["scores"]})
    rows: list[list[Any]] = [[*names, "seconds_per_image", *scores]]
    for job in jobs:
        for point in job["points"]:
            both = {**job, **point}
            pace = job["seconds_per_image"].get(str(point["sampler_steps"]), "")
            values = [point["scores"][name]["value"] if name in point["scores"] else "" for name in scores]
            rows.append([*(both[name] for name in names), pace, *values])
    return csv_text(rows)


# ---- images


def _images(jobs: Sequence[Mapping[str, Any]]) -> list[Block]:
    """Reconstructions of each first stage, and the last samples of each job; nothing where none were kept."""
    blocks: list[Block] = []
    seen = set()
    for job in sorted(jobs, key=lambda found: (found["downsampling"], found["max_steps"], found["seed"])):
        name, first_stage = f"f{job['downsampling']}", Path(job["first_stage"])
        if first_stage not in seen:
            patterns = ("reconstruction_*.png", "rebuilt_*.png")  # the second of format 1
            blocks += _newest(first_stage, "tradeoff-*", patterns, f"{name}: reconstructions")
        seen.add(first_stage)
        label = f"{name}: samples after {job['max_steps']:,} steps" + (f", seed {job['seed']}" if job["seed"] else "")
        last = f"step_{job['max_steps']:08d}-{job['points'][0]['sampler_steps']}-*"
        blocks += _newest(Path(job["folder"]), last, ("sample_*.png",), label)
    return blocks


def _newest(run: Path, evaluation: str, patterns: Sequence[str], label: str) -> list[Block]:
    """A row of images of the latest of a run's evaluations of that name, in any folder."""
    found = sorted(run.glob(f"evaluation/{evaluation}"), key=lambda folder: folder.stat().st_mtime)
    kept = sorted(path for folder in found[-1:] for pattern in patterns for path in folder.glob(f"*s/{pattern}"))
    shown = kept[:: max(len(kept) // _SHOWN_IMAGES, 1)][:_SHOWN_IMAGES]  # neighbours in the set look alike
    cards = [Card(((str(path.relative_to(found[-1])), ""),)) for path in shown]
    return [Gallery(found[-1], cards, "thumbnails", label, THUMBNAIL)] if cards else []
