"""The last lines that a run or an evaluation prints: folder, main numbers, cost, what falls short, the next command."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.app.compose import typed
from ldmlab.errors import InputError
from ldmlab.report.evaluation_page import score_lines
from ldmlab.report.line_chart import Points
from ldmlab.report.page_content import ARROW, DASH
from ldmlab.report.score_curves import read_curves
from ldmlab.report.score_lines import control_text, described, features_text, warnings_of
from ldmlab.training.stage import Stage
from ldmlab.training.step_metrics import duration
from ldmlab.training.validation import validation_line

_SHOWN = 6  # numbers in a line
_HIGHER = ("recall", "accuracy")  # validation metrics by the beginning of their names


def finished(run: Path, config: Mapping[str, Any], stage: Stage, *, nested: bool) -> str:
    """Of a run that reached its last step; the next command unless it is part of another one."""
    try:
        curves = read_curves(run / "metrics.csv")
    except InputError:  # the table is damaged or gone; the checkpoints are there
        curves = {}
    lines = [f"finished: {run}{_validated(curves, stage)}", _cost(curves, stage), _falls_short(curves, stage)]
    data = " ".join(typed(f"data.{split}", config["data"].get(split)) for split in ("train", "val"))
    latents = typed("out", f"{run}-latents")
    following = {
        "autoencoder": f"ldmlab encode data=shards {data} {typed('from_run', run)} {latents}",
        "clip": f"ldmlab train conditioner=text {typed('conditioner.text.from_run', run)} data.latents=LATENTS",
        "classifier": f"ldmlab sample MODEL 0 --classifier {shlex.quote(str(run))}",
        "diffusion": f"ldmlab evaluate {typed('model', run)}",
    }
    return "\n".join([*lines, *([] if nested else [f"next: {following[config['stage']['name']]}"])])


def _validated(curves: Mapping[str, Points], stage: Stage) -> str:
    """A line with the metrics of the last validation and their directions; empty without any."""
    points = {name.removeprefix("val/"): curve[-1] for name, curve in curves.items() if name.startswith("val/")}
    last = max((int(step) for step, _ in points.values()), default=0)
    shown = [
        f"{name} {value:.4g} {ARROW[_direction(name, stage)]}".strip()
        for name, (step, value) in points.items()
        if step == last and "/" not in name and not name.endswith("_std")
    ]
    return f"\nvalidation at step {last}: {', '.join(shown[:_SHOWN])}" if shown else ""


def _direction(name: str, stage: Stage) -> str:
    if name == stage.monitor:
        return "lower" if stage.monitor_mode == "min" else "higher"
    return "higher" if name.startswith(_HIGHER) else described(name)[1]


def _cost(curves: Mapping[str, Points], stage: Stage) -> str:
    """Steps, images, the time that the steps took by the logged speed, and memory."""
    parts = [f"{stage.step:,} steps, {stage.position:,} images"]
    speed, before, seconds = dict(curves.get("speed/images_per_second", ())), 0.0, 0.0
    for step, images in curves.get("images", ()):
        if speed.get(step):
            seconds += (images - before) / speed[step]
        before = images
    if seconds:
        parts.append(f"about {duration(seconds)} at {before / seconds:.4g} images/s")
    for name, where in (("memory/gpu_peak_gib", "GPU memory"), ("memory/peak_gib", "memory")):
        parts += [f"{max(value for _, value in curves[name]):.1f} GiB of {where}"] if name in curves else []
    return f"cost: {', '.join(parts)}"


def _falls_short(curves: Mapping[str, Points], stage: Stage) -> str:
    """What was skipped or cut, and a validation that was better before."""
    found = []
    for name, what in (("data/skipped", "training"), ("data/val_skipped", "validation")):
        if count := max((value for _, value in curves.get(name, ())), default=0.0):
            found.append(f"{count:,.0f} unreadable {what} images skipped")
    if cut := max((value for _, value in curves.get("captions_cut", ())), default=0.0):
        found.append(f"up to {cut:.1%} of captions cut")
    if monitored := curves.get(f"val/{stage.monitor}"):
        choose = min if stage.monitor_mode == "min" else max
        step, best = choose(monitored, key=lambda point: point[1])
        if best != monitored[-1][1]:
            found.append(f"{stage.monitor} was best at step {step:.0f}: {best:.4g}, {monitored[-1][1]:.4g} at the end")
    else:
        found.append("no validation")
    return f"falls short: {'; '.join(found) or 'nothing was skipped'}"


def ended_early(run: Path, stage: Stage, max_steps: int, command: str) -> str:
    """Of a run that a callback or a limit of the Trainer ended, with the command that resumes it."""
    return (
        f"ended at step {stage.step} of trainer.max_steps={max_steps} by a callback or limit of the trainer: {run}"
        f"{validation_line(stage.validated, stage.validated_at)}\nto go on: {command}"
    )


# ---- evaluations


def evaluated(result: Mapping[str, Any], out: Path) -> str:
    """Every score, then the last lines of an evaluation."""
    lines, sampling = score_lines(result), result["sampling"]
    rate = f" at {sampling['images_per_second']} a second" if sampling.get("images_per_second") else ""
    lacking = warnings_of(result)
    lacking += ["LPIPS left out, its weights are missing"] if result.get("perceptual", "") is None else []
    lacking += [f"see the notes on {', '.join(marked)}"] if (marked := [one.name for one in lines if one.note]) else []
    following = ["ldmlab", "report", str(out), "OTHER", "--out", "COMPARISON"]
    return "\n".join(
        [
            scores_text(result),
            f"report: {out / 'report.html'}",
            f"scores: {', '.join(f'{one.head} {one.value}' for one in lines[:_SHOWN])}",
            f"cost: {duration(result.get('seconds') or 0)} for {sampling['images']:,} images{rate}",
            f"falls short: {'; '.join(lacking) or 'nothing'}",
            f"next: {shlex.join(following)}",
        ]
    )


def scores_text(result: Mapping[str, Any]) -> str:
    """A line for each score with its spread, controls and caveats, and how many images it rests on."""
    reference, lines = result["reference"], []
    if "sampling" in result:
        total = f" of {lost['of']:,}" if (lost := reference.get("unreadable")) else ""
        lines.append(f"{result['sampling']['images']:,} images against {reference['images']:,}{total} real ones")
    lines.append(f"features: {features_text(result['features'])}")
    for name, score in result["scores"].items():
        spread = "" if score.get("spread") is None else f" +- {score['spread']:.3g}"
        beside = ", ".join(f"{title} {value}" for title, value in control_text(name, result) if value != DASH)
        marks = "".join(f"  ({mark})" for mark in (beside, *score["marks"]) if mark)
        lines.append(f"{name:<16} {score['value']:.6g}{spread}{marks}")
        points = (result.get("sample_curves") or {}).get(name, ())
        lines += [f"{'':<16} {point['value']:.6g} at {point['images']:,.0f} samples" for point in points]
    return "\n".join(lines)
