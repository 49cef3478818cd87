"""Memorisation audits as a page: shares beside held-out images, curves, advice when to stop, candidates."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab.report.line_chart import Chart
from ldmlab.report.page_content import Block, Card, Charts, Gallery, Page, Row, Section, Table, Text
from ldmlab.report.render import as_text, write_pages

Audit = Mapping[str, Any]  # the record of one model, with `label` and `run`
_GROUPS = (
    (True, "Extracted: samples of one caption agree, and a training image is as near as a copy."),
    (False, "Candidates that are no training image: samples of one caption agree with each other alone."),
)


def write_audit(out: Path, audits: Sequence[Audit]) -> str:
    """report.html, report.md and the values of the charts into `out`; the results as text."""
    advice = stopping_advice(audits)
    write_pages(out, audit_page(out, audits), out)
    return "\n".join([as_text([_table(audits)]).rstrip(), *advice])


def stopping_advice(audits: Sequence[Audit]) -> list[str]:
    """A sentence for each run of several checkpoints: the last one before copies exceed held-out images."""
    return [_advice(run, points) for run, points in _by_run(audits).items() if len(points) > 1]


def _advice(run: str, points: Sequence[Audit]) -> str:
    steps, name = [one["model"]["step"] for one in points], f"{Path(run).name} on {_images(points[0])} images"
    first = next((place for place, one in enumerate(points) if one["exceeds"]), None)
    if first is None:
        return f"{name}: copies do not exceed those of held-out images up to step {steps[-1]:,}, the last audited."
    shares = f"{_share(points[first]['copies'])} of samples, {_share(points[first]['held_out_copies'])} of held-out"
    if first == 0:
        return f"{name}: copies exceed ({shares} images) at step {steps[0]:,}, the first audited; keep earlier ones."
    return f"{name}: stop at step {steps[first - 1]:,}; at step {steps[first]:,} copies exceed ({shares} images)."


def audit_page(out: Path, audits: Sequence[Audit]) -> Page:
    """The page of one or more audits, whose images lie in `out`/LABEL."""
    last = audits[-1]
    tiles = [
        ("copies among samples", _share(last["copies"]), "samples nearer to a training image than the threshold"),
        ("among held-out images", _share(last["held_out_copies"]), "the same share of images never trained on"),
        ("extracted captions", _share(last["extracted"]), "whose samples agree on a training image"),
    ]
    advice: list[Block] = [Text(sentence) for sentence in stopping_advice(audits)]
    sections = [
        Section("Copies", [_table(audits), *advice]),
        Section("Over training and set size", [Charts(charts)] if (charts := _curves(audits)) else []),
        Section("Distance to the nearest training image", [Charts([_distances(one) for one in audits[-6:]])]),
        *(section for one in reversed(audits) for section in _found(out, one)),
        Section("Settings and origin", [_settings(last)]),
    ]
    lead = (
        f"Each caption is sampled {last['samples_each']} times. Where at least {last['clique']} samples agree it "
        f"is a candidate, and extracted if they agree on a training image. Copies are nearer to one than "
        f"all but {last['quantile']:.1%} of held-out images. {last['label'] if len(audits) > 1 else ''}"
    )
    return Page("Memorisation", lead.strip(), sections, tiles)


def _table(audits: Sequence[Audit]) -> Table:
    columns = (
        *("step", "training images", "captions x samples", "copies, %", "of held-out, %", "more than held-out"),
        *("candidates, %", "extracted, %", "images", "perfect copies found, %"),
    )
    rows = []
    for one in audits:
        cells = [
            *(f"{one['model'].get('step') or 0:,}", _images(one), f"{one['conditions']:,} x {one['samples_each']}"),
            *(_interval(one["copies"]), _interval(one["held_out_copies"]), "yes" if one["exceeds"] else "no"),
            *(_interval(one["candidates"]), _interval(one["extracted"]), f"{one['extracted_images']:,}"),
            _interval(one["sensitivity"]),
        ]
        rows.append(Row("theirs", one["label"], cells))
    notes = [
        "In parentheses 95 % intervals (Wilson; of samples with the effective number of Korn and Graubard). “More than "
        "held-out”: the 95 % interval of the difference (Newcombe) lies above 0.",
        "Perfect copies: training images after the model's own first stage, of which the audit should find all.",
        *dict.fromkeys(f"{one['label']}: {text}." for one in audits for text in one["warnings"]),
    ]
    return Table("Copies", columns, rows, notes, "model")


def _curves(audits: Sequence[Audit]) -> list[Chart]:
    """Shares over steps, a line a run, and at each run's last checkpoint over the set size."""
    runs, charts = _by_run(audits), []
    names = {"copies": "copies among samples", "held_out_copies": "held-out images", "extracted": "extracted captions"}
    if max(map(len, runs.values())) > 1:
        step = {id(one): float(one["model"]["step"] or 0) for one in audits}
        for key in ("copies", "extracted"):
            lines = {_line(run, runs): (points, key) for run, points in runs.items()}
            if key == "copies":
                lines |= {f"held-out, {_line(run, runs)}": (points, "held_out_copies") for run, points in runs.items()}
            charts.append(_chart(f"{names[key]} over steps", lines, step, "step"))
    last = sorted((points[-1] for points in runs.values()), key=lambda one: one["training"]["images"])
    size = {id(one): float(one["training"]["images"]) for one in last}
    if len(set(size.values())) > 1:
        by_share = {name: (last, key) for key, name in names.items()}
        charts.append(_chart("at the last checkpoint", by_share, size, "training images"))
    return charts


def _chart(title: str, lines: Mapping[str, tuple[Sequence[Audit], str]], x: Mapping[int, float], x_title: str) -> Chart:
    """Shares in percent with half their intervals as bars; `lines`: audits and the share's key; x: by id."""
    series, spreads = {}, {}
    for name, (points, key) in lines.items():
        series[name] = [(x[id(one)], 100 * one[key]["value"]) for one in points]
        spreads[name] = [50 * (one[key]["high"] - one[key]["low"]) for one in points]
    return Chart(f"{title}, %", series, x_title, x_title != "step", spreads=spreads)


def _distances(one: Audit) -> Chart:
    """Shares of samples and of held-out images within a distance, and the threshold."""
    series = {
        name.replace("_", "-"): [(x, 100 * place / (len(xs) - 1)) for place, x in enumerate(xs)]
        for name, xs in one["distances"].items()
    }
    series["threshold"] = [(one["threshold"], 0.0), (one["threshold"], 100.0)]
    return Chart(f"{one['label']}: % within a distance", series, "cosine distance")


def _found(out: Path, one: Audit) -> list[Section]:
    blocks: list[Block] = []
    for extracted, note in _GROUPS:
        shown = [row for row in one["candidate_list"] if row["extracted"] == extracted and "sample_file" in row]
        cards = [_card(one, "sample_file", row, "copy" if extracted else "") for row in shown]
        blocks += [Text(note), Gallery(out, cards, "pairs")] if cards else []
    cards = [_card(one, "held_out", row) for row in one["at_threshold"]]
    blocks += [Text("Held-out images at the threshold: as near as these are."), Gallery(out, cards, "pairs")]
    return [Section(f"Images of {one['label']}", blocks)]


def _card(one: Audit, left: str, row: Mapping[str, Any], mark: str = "") -> Card:
    words = f"“{row['caption']}” beside “{row['train_caption']}”, {row['distance']:.3g}"
    if "agree" in row:
        words += f"; {row['agree']} of {one['samples_each']} samples agree"
    if (copies := row.get("duplicates", 1)) > 1:
        words += f"; {copies} training images as near to it"
    return Card([(f"{one['label']}/{row[side]}", words) for side in (left, "train")], words, mark)


def _settings(one: Audit) -> Table:
    made, features = one["provenance"], one["features"]
    rows = [(f"sampling: {name}", value) for name, value in one["sampling"].items()]
    rows += [(f"model: {name}", value) for name, value in one["model"].items()]
    rows += [
        *(
            (f"{split}: {key}", one[split][key])
            for split in ("training", "held_out")
            for key in ("folder", "images", "manifest_hash")
        ),
        ("features", f"{features['name']}, {features['width']} wide, weights {features['weights_hash']}"),
        *(("threshold", f"{one['threshold']:.4g}"), ("quantile", one["quantile"]), ("clique", one["clique"])),
        *(("command", made["command"]), ("commit", made["commit"]), ("date", made["time_utc"])),
    ]
    return Table.of_pairs([(name, str(value)) for name, value in rows])


def _by_run(audits: Sequence[Audit]) -> dict[str, list[Audit]]:
    """Audits of one run by step."""
    found: dict[str, list[Audit]] = {}
    for one in sorted(audits, key=lambda one: one["model"].get("step") or 0):
        found.setdefault(one["run"], []).append(one)
    return found


def _line(run: str, runs: Mapping[str, Sequence[Audit]]) -> str:
    return f"n = {_images(runs[run][0])}" if len(runs) > 1 else Path(run).name


def _images(one: Audit) -> str:
    return f"{one['training']['images']:,}"


def _share(share: Mapping[str, float]) -> str:
    return f"{100 * share['value']:.1f}%"


def _interval(share: Mapping[str, float]) -> str:
    return f"{100 * share['value']:.1f} ({100 * share['low']:.1f} .. {100 * share['high']:.1f})"
