"""How well samples follow their conditions: classifiers, baselines, and inputs with samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab.report.rows import DASH, Block, Card, Gallery, Row, Section, Table, Text
from ldmlab.report.score_lines import ScoreLine, number_text, score_line, share_text

_CARDS = 12  # samples shown with their inputs and the answers of baselines


def accuracy_lines(result: Mapping[str, Any]) -> list[ScoreLine]:
    """Lines of the table of scores: each evaluator on samples and on real images."""
    lines = []
    for name, found in (result.get("evaluators") or {}).items():
        training = found.get("training_captions")
        parts = [("", found)] if not training else [(", validation captions", found), (", training captions", training)]
        for kind, part in parts:
            title = f"Conditioning accuracy{kind}: {found['measures']}"
            key = f"accuracy_{name}" + ("_training" if part is training else "")
            lines.append(
                ScoreLine(key, title, share_text(part["samples"]), "higher", str(found["how"]), _note(found, part))
            )
        lines.append(_limit(f"accuracy_{name}_real", share_text(found["real"]), found))
    return lines


def _note(found: Mapping[str, Any], part: Mapping[str, Any]) -> str:
    """How to read a value: compared with real images, chance and exchanged conditions."""
    notes = [f"{share_text(part['of_real'])} of its value on real images"]
    notes += [f"chance {share_text(found['chance'])}"] if found["chance"] is not None else []
    if part.get("shuffled") is not None:
        notes.append(f"with conditions exchanged between samples {share_text(part['shuffled'])}")
    notes += [f"guidance scale {found['guidance_scale']:g}"] if found.get("guidance_scale") is not None else []
    return "; ".join(notes)


def _limit(name: str, value: str, found: Mapping[str, Any]) -> ScoreLine:
    note = f"the upper limit of the line above{learned_note(found)}"
    return ScoreLine(name, "Classifier accuracy on real images", value, "info", "of held-out real images", note)


def learned_note(found: Mapping[str, Any]) -> str:
    """Size of a classifier's training, after a semicolon; nothing for records without it."""
    if not (learned := found.get("learned")):
        return ""
    return "; trained on {examples:,} real examples in {updates:,} updates of {batch_size}".format(**learned)


def conditioning(result: Mapping[str, Any], folder: Path) -> list[Section]:
    """The model among the baselines, each classifier's classes, and images by category."""
    sections = [Section("Beside baselines without a model", [_baselines(result)])] if result.get("baselines") else []
    for found in (result.get("evaluators") or {}).values():
        heading = found["measures"][:1].upper() + found["measures"][1:]
        sections.append(Section(f"Conditioning accuracy: {heading}", [_classes(found), *_examples(found, folder)]))
    return sections


def _baselines(result: Mapping[str, Any]) -> Table:
    lines = {name: score_line(name, score, result) for name, score in result["scores"].items()}
    rows = [
        Row("theirs", str(found["title"]), tuple(_value(found["scores"].get(name)) for name in lines))
        for found in result["baselines"].values()
    ]
    rows.append(Row("ours", "this model", tuple(_value(score) for score in result["scores"].values())))
    note = "All have the same inputs and are compared with the same real images through the same features."
    return Table("", tuple(line.head for line in lines.values()), tuple(rows), (note,))


def _value(score: Mapping[str, Any] | None) -> str:
    return DASH if score is None else number_text(score["value"])


def _classes(found: Mapping[str, Any]) -> Table:
    training = found.get("training_captions")
    others = training["classes"] if training else [{}] * len(found["classes"])
    rows = [
        Row("theirs", str(one["name"]), (_of(one, "real"), _of(one, "samples"), *_of_training(other)))
        for one, other in zip(found["classes"], others, strict=True)
        if one["real_count"] or one["samples_count"]
    ]
    means = [share_text(found["real"]), share_text(found["samples"])]
    columns = ["held-out real images", "samples, validation captions" if training else "samples"]
    if training:
        means.append(share_text(training["samples"]))
        columns.append("samples, training captions")
    notes = [found["how"]]
    if found.get("shuffled") is not None:
        exchanged = share_text(found["shuffled"])
        notes.append(f"The same samples with conditions exchanged between them: {exchanged}.")
    notes += [f"Guessing reaches {share_text(found['chance'])}."] if found["chance"] is not None else []
    total = Row("ours", "mean over classes", tuple(means))
    return Table("", tuple(columns), (*rows, total), tuple(notes), "class")


def _of_training(one: Mapping[str, Any]) -> list[str]:
    return [_of(one, "samples")] if one else []


def _of(one: Mapping[str, Any], kind: str) -> str:
    return DASH if one[kind] is None else f"{share_text(one[kind])} of {one[f'{kind}_count']:,}"


def _examples(found: Mapping[str, Any], folder: Path) -> list[Block]:
    """Each class's samples that were generated for the evaluator; none where it used the protocol's."""
    training = found.get("training_captions") or {}
    blocks: list[Block] = []
    for part, kind in ((found, "Validation"), (training, "Training")):
        cards = tuple(
            Card(((one["file"], one["caption"]),), str(one["class"]), "right" if one["right"] else "wrong")
            for one in sorted(part.get("images") or (), key=lambda one: str(one["class"]))
        )
        blocks += [Gallery(folder, cards, "small", f"{kind} captions")] if cards else []
    return [Text("Green frame: classified as the class of its caption."), *blocks] if blocks else []


def inputs_and_samples(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """Input, baselines' results, sample and original, a row each."""
    if not (given := result.get("given")):
        return []
    columns: list[tuple[str, Sequence[str]]] = [("input", given)]
    columns += [(str(found["title"]), found["images"]) for found in (result.get("baselines") or {}).values()]
    columns += [("generated", _files(result, "samples")), ("real", _files(result, "real"))]
    rows = list(zip(*(files for _, files in columns), strict=True))
    titles = [title for title, _ in columns]
    stride = max(len(rows) // _CARDS, 1)
    cards = tuple(Card(tuple(zip(files, titles, strict=True))) for files in rows[::stride][:_CARDS])
    return [Text(f"From left to right: {', '.join(titles)}."), Gallery(folder, cards, "rows")]


def _files(result: Mapping[str, Any], kind: str) -> list[str]:
    return [item["file"] for item in result["images"][kind]]
