"""How well samples follow their conditions: classifiers, baselines, and inputs with samples."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.report.page_content import DASH, Block, Card, Gallery, Row, Section, Table, Text
from ldmlab.report.score_lines import ScoreLine, number_text, score_line, share_text

_CARDS = 12  # samples shown with their inputs and the answers of baselines


def accuracy_lines(result: Mapping[str, Any]) -> list[ScoreLine]:
    """Lines of the table of scores: each evaluator on samples and on real images."""
    lines = []
    for name, found in (result.get("evaluators") or {}).items():
        key, training = f"accuracy_{name}", found.get("training_captions")
        parts = [(key, "", found)]
        if training:
            parts = [(key, ", validation captions", found), (f"{key}_training", ", training captions", training)]
        for own, kind, part in parts:
            title, value = f"Conditioning accuracy{kind}: {found['measures']}", share_text(part["samples"])
            lines.append(ScoreLine(own, title, value, "higher", str(found["how"]), _note(found, part)))
        title, note = "Classifier accuracy on real images", "the upper limit of the line above"
        if learned := found.get("learned"):
            text = "; trained on {examples:,} real examples in {updates:,} updates of {batch_size}"
            note += text.format(**learned)
        value = share_text(found["real"])
        lines.append(ScoreLine(f"{key}_real", title, value, "info", "of held-out real images", note))
    return lines


def _note(found: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """How to read a value: compared with real images, chance and exchanged conditions."""
    notes = [f"{share_text(part['of_real'])} of its value on real images"]
    notes += [f"chance {share_text(found['chance'])}"] if found["chance"] is not None else []
    if part.get("shuffled") is not None:
        notes.append(f"with conditions exchanged between samples {share_text(part['shuffled'])}")
    notes += [f"guidance scale {found['guidance_scale']:g}"] if found.get("guidance_scale") is not None else []
    return "; ".join(notes)


def conditioning(result: Mapping[str, Any]) -> list[Section]:
    """The model among the baselines, each classifier's classes, and images by category."""
    sections = []
    if baselines := result.get("baselines"):
        scores = result["scores"]
        heads = [score_line(name, score, result).head for name, score in scores.items()]
        every = [("theirs", str(found["title"]), found["scores"]) for found in baselines.values()]
        rows = [
            Row(kind, title, [DASH if own.get(name) is None else number_text(own[name]["value"]) for name in scores])
            for kind, title, own in [*every, ("ours", "this model", scores)]
        ]
        note = "All have the same inputs and are compared with the same real images through the same features."
        sections.append(Section("Beside baselines without a model", [Table("", heads, rows, [note])]))
    for found in (result.get("evaluators") or {}).values():
        heading = f"Conditioning accuracy: {found['measures'][:1].upper()}{found['measures'][1:]}"
        sections.append(Section(heading, [_classes(found), *_examples(found, Path(result["folder"]))]))
    return sections


def _classes(found: Mapping[str, Any]) -> Table:
    training = found.get("training_captions")
    columns = {"held-out real images": (found, "real"), "samples": (found, "samples")}
    if training:
        columns["samples, validation captions"] = columns.pop("samples")
        columns["samples, training captions"] = (training, "samples")
    rows = []
    for classes in zip(*(part["classes"] for part, _ in columns.values()), strict=True):
        if classes[0]["real_count"] or classes[0]["samples_count"]:
            numbers = [
                (one[kind], one[f"{kind}_count"]) for one, (_, kind) in zip(classes, columns.values(), strict=True)
            ]
            cells = [DASH if share is None else f"{share_text(share)} of {count:,}" for share, count in numbers]
            rows.append(Row("theirs", str(classes[0]["name"]), cells))
    rows.append(Row("ours", "mean over classes", [share_text(part[kind]) for part, kind in columns.values()]))
    notes = [found["how"]]
    if found.get("shuffled") is not None:
        exchanged = share_text(found["shuffled"])
        notes.append(f"The same samples with conditions exchanged between them: {exchanged}.")
    notes += [f"Guessing reaches {share_text(found['chance'])}."] if found["chance"] is not None else []
    return Table("", list(columns), rows, notes, "class")


def _examples(found: Mapping[str, Any], folder: Path) -> list[Block]:
    """Each class's samples that were generated for the evaluator; none where it used the protocol's."""
    blocks: list[Block] = []
    for part, kind in ((found, "Validation"), (found.get("training_captions") or {}, "Training")):
        cards = [
            Card([(one["file"], one["caption"])], str(one["class"]), "right" if one["right"] else "wrong")
            for one in sorted(part.get("images") or (), key=lambda one: str(one["class"]))
        ]
        blocks += [Gallery(folder, cards, "small", f"{kind} captions")] if cards else []
    return [Text("Green frame: classified as the class of its caption."), *blocks] if blocks else []


def inputs_and_samples(result: Mapping[str, Any]) -> list[Section]:
    """Input, baselines' results, sample and original, a row each."""
    if not (given := result.get("given")):
        return []
    columns = [("input", given)]
    columns += [(str(found["title"]), found["images"]) for found in (result.get("baselines") or {}).values()]
    for title, kind in (("generated", "samples"), ("real", "real")):
        columns.append((title, [item["file"] for item in result["images"][kind]]))
    titles = [title for title, _ in columns]
    rows = list(zip(*(files for _, files in columns), strict=True))
    shown = rows[:: max(len(rows) // _CARDS, 1)][:_CARDS]
    cards = [Card(list(zip(files, titles, strict=True))) for files in shown]
    gallery = Gallery(Path(result["folder"]), cards, "rows")
    return [Section("Inputs and samples", [Text(f"From left to right: {', '.join(titles)}."), gallery])]
