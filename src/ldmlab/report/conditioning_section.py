"""How well samples follow their conditions: classifiers, baselines, and inputs beside samples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldmlab.report.rows import DASH, Block, Card, Gallery, Row, Section, Table, Text
from ldmlab.report.score_lines import ScoreLine, number_text, score_line, share_text

_CARDS = 12  # samples shown with their inputs and the answers of baselines


def accuracy_lines(result: Mapping[str, Any]) -> list[ScoreLine]:
    """Lines of the table of scores: each classifier on samples and on real images."""
    lines = []
    for name, found in (result.get("judges") or {}).items():
        chance = f"chance {share_text(found['chance'])}; " if found["chance"] is not None else ""
        note = f"{share_text(found['of_real'])} of its value on real images; {chance}"
        note += f"with conditions exchanged between samples {share_text(found['shuffled'])}"
        value, real = share_text(found["samples"]), share_text(found["held_out_real"])
        meaning = str(found["how"])
        lines.append(
            ScoreLine(f"judge_{name}", f"Conditioning accuracy: {found['measures']}", value, "higher", meaning, note)
        )
        lines.append(_limit(f"judge_{name}_real", real, found))
    if found := result.get("categories"):
        shared = f"chance is {share_text(found['chance'])}; guidance scale {found['guidance_scale']:g}"
        meaning = "samples put into the category of their caption, mean over categories"
        for name, kind, part in (("samples", "validation", found), ("seen", "training", found["training_captions"])):
            heading = f"Conditioning accuracy, {kind} captions"
            note = f"{'none' if part['ratio'] is None else format(part['ratio'], '.0%')} of real; {shared}"
            lines.append(ScoreLine(name, heading, share_text(part["samples"]), "higher", meaning, note))
        lines.append(_limit("held_out_real", share_text(found["held_out_real"]), found))
    return lines


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
    for found in (result.get("judges") or {}).values():
        heading = found["measures"][:1].upper() + found["measures"][1:]
        sections.append(Section(f"Conditioning accuracy: {heading}", [_classes(found)]))
    if found := result.get("categories"):
        sections.append(Section("Conditioning accuracy", _categories(found, folder)))
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
    rows = [
        Row("theirs", str(one["name"]), (_of(one, "real"), _of(one, "samples")))
        for one in found["classes"]
        if one["real_count"] or one["samples_count"]
    ]
    total = Row("ours", "mean over classes", (share_text(found["held_out_real"]), share_text(found["samples"])))
    chance = [f"Guessing reaches {share_text(found['chance'])}."] if found["chance"] is not None else []
    exchanged = f"The same samples with conditions exchanged between them: {share_text(found['shuffled'])}."
    return Table("", ("held-out real images", "samples"), (*rows, total), (found["how"], exchanged, *chance), "class")


def _of(one: Mapping[str, Any], kind: str) -> str:
    return DASH if one[kind] is None else f"{share_text(one[kind])} of {one[f'{kind}_count']:,}"


def _categories(found: Mapping[str, Any], folder: Path) -> list[Block]:
    """A table by category, then each category's samples."""
    seen = found["training_captions"]
    rows = [
        Row("theirs", str(row["category"]), (_count(row, "real"), _count(row, "samples"), _count(other, "samples")))
        for row, other in zip(found["by_category"], seen["by_category"], strict=True)
    ]
    means = tuple(share_text(value) for value in (found["held_out_real"], found["samples"], seen["samples"]))
    note = (
        f"A classifier trained on real training images alone; means are over categories; chance is "
        f"{share_text(found['chance'])}."
    )
    columns = ("held-out real images", "samples, validation captions", "samples, training captions")
    table = Table("", columns, (*rows, Row("ours", "mean over categories", means)), (note,), "category")
    blocks: list[Block] = [table, Text("Green frame: classified as the category of its caption.")]
    for part, kind in ((found, "Validation"), (seen, "Training")):
        images = sorted(part["images"], key=lambda one: str(one["category"]))
        cards = tuple(
            Card(((one["file"], one["caption"]),), str(one["category"]), "right" if one["right"] else "wrong")
            for one in images
        )
        blocks.append(Gallery(folder, cards, "small", f"{kind} captions"))
    return blocks


def _count(row: Mapping[str, Any], kind: str) -> str:
    return f"{row[f'{kind}_right']} of {row[kind]}"


def inputs_and_samples(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """Input, answers of baselines, sample and original, a row each."""
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
