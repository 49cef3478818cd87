"""An evaluation folder as a page: report.html (one file, opens anywhere) and report.md (for a terminal)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab import format1
from ldmlab.checkpoints import write_atomically
from ldmlab.errors import InputError
from ldmlab.report.paper_table import paper_tables
from ldmlab.report.report_audit import verdict
from ldmlab.report.report_curves import curve_markdown
from ldmlab.report.report_formats import FORMATS, as_markdown
from ldmlab.report.report_html import comparison_page, evaluation_page
from ldmlab.report.report_table import bare_table, folder_name, paper_report
from ldmlab.report.report_task import learned_note, task_markdown, task_rows
from ldmlab.report.score_names import called, score_text
from ldmlab.report.side_by_side import comparison_tables

# Name shown, direction, and what the number says.
MEANING = {
    "fid": ("Fréchet distance", "lower", "distance between the Gaussians of real and drawn features"),
    "fid_other_split": ("Fréchet distance, other split", "lower", "the same samples beside the other split's images"),
    "fid_inf": ("Fréchet distance, infinitely many samples", "lower", "extrapolated by a line over 1 / samples"),
    "sfid": ("sFID", "lower", "the same distance for features that keep their place in the image"),
    "cmmd": ("CMMD", "lower", "kernel distance of CLIP embeddings, times 1000"),
    "clip_score": ("CLIP score", "higher", "100 x cosine of drawn images and their captions; spread: of the mean"),
    "density": ("Density", "higher", "real balls that a drawn image lies in, over k; 1 for two halves of one set"),
    "coverage": ("Coverage", "higher", "share of real balls that hold a drawn image"),
    "kid": ("Kernel distance", "lower", "unbiased distance of the features; about 0 for two halves of one set"),
    "precision": ("Precision", "higher", "share of drawn images that lie among real ones: do they look real?"),
    "recall": ("Recall", "higher", "share of real images that lie among drawn ones: is everything covered?"),
    "psnr": ("PSNR", "higher", "of the rebuilt images, dB, mean over images"),
    "psnr_object": ("PSNR, objects", "higher", "the same over pixels that are not background, pooled"),
    "ssim": ("SSIM", "higher", "structural similarity of the rebuilt images"),
    "lpips": ("LPIPS", "lower", "perceptual distance of the rebuilt images"),
    "psim": ("PSIM", "lower", "the same network without learned weights"),
    "is": ("Inception Score", "higher", "how sure and how varied the network's labels are"),
    "held_out_real": ("Judge on real images", "info", "held-out real images put into their category, balanced"),
    "samples": ("Judge, held-out captions", "higher", "samples put into the category they were asked for, balanced"),
    "seen": ("Judge, training captions", "higher", "the same for captions of training images"),
    "copies": ("Copies", "lower", "samples nearer to a training image than nearly all held-out images are"),
}

CATEGORY_HEAD = ("| category | real images right | held-out captions | training captions |", "|---|---|---|---|")


def read_evaluation(folder: Path) -> dict[str, Any]:
    """metrics.json of an evaluation folder, or of the `evaluation` folder inside a run."""
    for place in (folder, folder / "evaluation"):
        try:
            result = json.loads((place / "metrics.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise InputError(f"{place / 'metrics.json'} cannot be read ({error}); run the evaluation again.") from None
        if not isinstance(result, dict) or result.get("format_version") != 1:
            raise InputError(f"{place / 'metrics.json'} is of another version; run the evaluation again.")
        return format1.record(result) | {"folder": str(place)}
    raise InputError(f"{folder} holds no metrics.json; give a folder that `python evaluate.py` wrote.")


def write_report(folder: Path) -> Path:
    """report.html and report.md of one evaluation folder; the path of the page."""
    result = read_evaluation(folder)
    place = Path(result["folder"])
    _write(place / "report.html", evaluation_page(result, place, score_rows(result)))
    _write(place / "report.md", markdown(result))
    return place / "report.html"


def _full_evaluations(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What may stand side by side, each once; scores of a few samples taken while training may not."""
    results = list({result["folder"]: result for result in map(read_evaluation, folders)}.values())
    for result in results:
        if tag := result.get("in_training"):
            raise InputError(
                f"{result['folder']} was scored while training, on {tag['samples']} samples, which compare within "
                "their run alone; score the checkpoint with evaluate.py and give that folder."
            )
    return results


def write_comparison(folders: Sequence[Path], out: Path) -> Path:
    """One page for several evaluations, side by side."""
    results = _full_evaluations(folders)
    out.mkdir(parents=True, exist_ok=True)
    rows = {title(result): score_rows(result) for result in results}
    if len(rows) < len(results):
        rows = {result["folder"]: score_rows(result) for result in results}
    tables = comparison_tables(results, list(rows), list(rows.values()))
    _write(out / "report.html", comparison_page(results, list(rows), [*paper_report(results), *tables]))
    _write(out / "report.md", "# Comparison\n\n" + as_markdown([*paper_report(results), *tables]))
    return out / "report.html"


def printed_tables(folders: Sequence[Path], form: str, table: str | None = None) -> str:
    """The paper's tables with our rows, then the evaluations beside one another; form: text | md | latex | html.

    Without folders the paper's tables as they are: the one given, or all.
    """
    if not folders:
        return FORMATS[form]([bare_table(name) for name in ([table] if table else paper_tables())])
    results = _full_evaluations(folders)
    tables = paper_report(results, table)
    if table is None:
        scores = [score_rows(result) for result in results]
        tables += comparison_tables(results, [folder_name(result) for result in results], scores)
    return FORMATS[form](tables)


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def title(result: Mapping[str, Any]) -> str:
    """The model's folder name and the protocol."""
    return f"{Path(str(result['model'].get('path', 'model'))).name} by {result['protocol']['name']}"


def score_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Every number of the evaluation with its spread, direction, meaning and marks, ready to print."""
    rows = []
    for name, score in result["scores"].items():
        row = _row(name, score["value"], score["spread"], "; ".join(score["marks"]))
        rows.append(row | {"shown": called(name, row["shown"], result)})
    rows += task_rows(result)
    if categories := result.get("categories"):
        mark = f"chance is {categories['chance']:.0%}; guidance {categories['guidance_scale']:g}"
        limit = f"the judge's own limit{learned_note(categories)}"
        rows += [_row("held_out_real", categories["held_out_real"], None, limit)]
        rows += [_row("samples", categories["samples"], None, f"{_ratio(categories)} of real; {mark}")]
        seen = categories["training_captions"]
        rows += [_row("seen", seen["samples"], None, f"{_ratio(seen)} of real; {mark}")]
    if (neighbours := result.get("neighbours")) and neighbours["copies"] is not None:
        expected = neighbours.get("expected", 0.01)
        note = f"{expected:.1%} expected of images never seen in training"
        rows += [_row("copies", neighbours["copies"], neighbours.get("error"), note)]
    return rows


def _ratio(categories: Mapping[str, Any]) -> str:
    return "none" if categories["ratio"] is None else f"{categories['ratio']:.0%}"


def _row(name: str, value: float, spread: float | None, note: str) -> dict[str, str]:
    shown, direction, meaning = MEANING.get(name, (name, "info", ""))
    text = score_text(name, value, spread)
    return {"name": name, "shown": shown, "value": text, "direction": direction, "meaning": meaning, "note": note}


def markdown(result: Mapping[str, Any]) -> str:
    """The report as text: scores, categories, the paper's table, settings; images by link."""
    lines = [f"# {title(result)}", "", "## Scores", "", "| score | value | better | note |", "|---|---|---|---|"]
    for row in score_rows(result):
        lines.append(f"| {row['shown']} | {row['value']} | {row['direction']} | {row['note']} |")
    lines += ["", "## Samples", ""]
    lines += [f"![{item['caption']}]({item['file']})" for item in result["images"]["samples"]]
    if categories := result.get("categories"):
        lines += ["", "## Categories", "", *CATEGORY_HEAD]
        lines += [
            f"| {row['category']} | {row['real_right']} of {row['real']} | {row['samples_right']} of {row['samples']} "
            f"| {seen['samples_right']} of {seen['samples']} |"
            for row, seen in zip(categories["by_category"], categories["training_captions"]["by_category"], strict=True)
        ]
    lines += task_markdown(result)
    lines += curve_markdown(result)
    if neighbours := result.get("neighbours"):
        lines += ["", "## Learned by heart?", "", verdict(neighbours)]
    if tables := paper_report([result]):
        lines += ["", "## The paper's tables", "", *as_markdown(tables).splitlines()]
    lines += _open_lines(result["protocol"].get("leaves_open") or {})
    lines += ["", "## Settings", "", "| setting | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in settings_rows(result)]
    return "\n".join(lines) + "\n"


def _open_lines(leaves_open: Mapping[str, str]) -> list[str]:
    """What the paper does not fix."""
    if not leaves_open:
        return []
    lines = ["", "## What the paper leaves open", "", "| setting | here |", "|---|---|"]
    return lines + [f"| {name} | {text} |" for name, text in leaves_open.items()]


def _more_networks(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How images come into the features' network, the CLIP beside it, and the network of LPIPS."""
    features, perceptual = result["features"], result.get("perceptual")
    rows = [("features: images", features["preparation"])] if "preparation" in features else []
    if "text_name" in features:
        rows.append(("features: CLIP", f"{features['text_name']}, weights {features['text_weights_hash']}"))
    if "perceptual" in result:
        told = "left out: its VGG weights were not here"
        rows.append(("LPIPS", f"{perceptual['name']}, weights {perceptual['weights_hash']}" if perceptual else told))
    return rows


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in options.items()) or "not recorded"


def settings_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Everything that decides the numbers, in reading order."""
    reference, features = result["reference"], result["features"]
    rows = [(f"sampling: {name}", str(value)) for name, value in result["sampling"].items()]
    rows += [(f"model: {name}", str(value)) for name, value in result["model"].items()]
    rows += [("protocol: changed", text) for text in result["protocol"].get("changed") or ()]
    rows += [
        ("reference", f"{reference['images']} images of {reference['split']}, {reference['image_size']} px"),
        ("reference: manifest", reference["manifest_hash"]),
        ("reference: preparation", _words(reference["transform"])),
        *([("reference: resized", reference["resized"])] if reference.get("resized") else []),
        ("reference: source", reference["source"]),
        ("features", f"{features['name']}, {features['width']} wide, weights {features['weights_hash']}"),
        *_more_networks(result),
        ("took", f"{result['seconds']} s"),
    ]
    made = result["provenance"]
    rows += [("command", made["command"]), ("commit", str(made["commit"])), ("time", made["time_utc"])]
    return [*rows, ("versions", ", ".join(f"{name} {version}" for name, version in made["packages"].items()))]
