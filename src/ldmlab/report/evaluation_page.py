"""One evaluation as a page: images first, then scores, then all settings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ldmlab.report.conditioning_section import accuracy_lines, conditioning, inputs_and_samples
from ldmlab.report.metrics_json import reading, title
from ldmlab.report.paper_table import paper_report
from ldmlab.report.rows import DASH, Block, Card, Charts, Gallery, Page, Row, Section, Table, Text
from ldmlab.report.score_curves import over_scales, run_charts
from ldmlab.report.score_lines import ScoreLine, number_text, score_line

_FIRST_CHARTS = 6  # of a run; the others are folded away
_GROUPS = (  # of pairs with training images; older records have only `pairs`
    ("closest", "sample", "The samples nearest to a training image, of all that were generated."),
    ("held_out", "held_out", "Held-out real images at the threshold: as near as these two different images are."),
    ("pairs", "sample", "Ordinary samples with the training images nearest to them."),
)


def evaluation_page(result: Mapping[str, Any]) -> Page:
    """The page of one record; a damaged part is an InputError that names the part."""
    folder = Path(result["folder"])
    record = folder / "metrics.json"
    parts: tuple[tuple[str, Callable[[Mapping[str, Any], Path], list[Section]]], ...] = (
        ("images", lambda result, folder: [Section("Generated and real", _samples(result, folder))]),
        ("scores", lambda result, folder: [_scores(result)]),
        ("given", lambda result, folder: [Section("Inputs and samples", inputs_and_samples(result, folder))]),
        ("evaluators", conditioning),
        ("curves over scales", lambda result, folder: over_scales(result)),
        ("neighbours", lambda result, folder: [Section("Memorisation", _memorisation(result, folder))]),
        ("extras", lambda result, folder: [Section("More images", _extras(result, folder))]),
        ("curves", lambda result, folder: [Section("Training", _training(result, folder))]),
        ("buckets", lambda result, folder: [Section("By size of the hole", _buckets(result))]),
        ("paper", lambda result, folder: [Section("The paper's tables", _paper(result))]),
        (
            "leaves_open",
            lambda result, folder: [Section("What the paper leaves open, and the choice here", _open(result))],
        ),
        ("settings", lambda result, folder: [Section("Settings and origin", [Table.of_pairs(settings_rows(result))])]),
    )
    sections = []
    for name, part in parts:
        with reading(record, name):
            sections += [section for section in part(result, folder) if section.blocks]
    with reading(record, "sampling or reference"):
        tiles = [(line.head, line.value.split(" ±")[0], line.meaning) for line in score_lines(result)]
        return Page(title(result), _lead(result), sections, tiles)


def score_lines(result: Mapping[str, Any]) -> list[ScoreLine]:
    """Every score of the evaluation with its spread, direction, meaning and marks."""
    lines = [score_line(name, score, result) for name, score in result["scores"].items()]
    lines += accuracy_lines(result)
    if (found := result.get("neighbours")) and found["copies"] is not None:
        note = f"{found.get('expected', 0.01):.1%} expected of images never seen in training"
        score = {"value": found["copies"], "spread": found.get("error"), "marks": [note]}
        lines.append(score_line("copies", score, result))
    return lines


def _lead(result: Mapping[str, Any]) -> str:
    """Description of the images of the page."""
    sampling, reference = result["sampling"], result["reference"]
    beside = f"{images_of(reference)} {_split(result)} images"
    features = f"Features: {result['features']['name']}{_quality(result['features'].get('quality'))}."
    if "steps" not in sampling:
        return f"Reconstructions of {beside} of {sampling['size']} px, compared with the originals. {features}"
    scale = sampling["guidance_scale"]
    return (
        f"{sampling['images']:,} images of {sampling['size']} px, {sampling['steps']} {sampling['sampler'].upper()} "
        f"steps, guidance scale {scale:g}, eta {sampling['eta']:g}, {result['model'].get('weights', '')} "
        f"weights, compared with {beside}. {features}"
    )


def images_of(reference: Mapping[str, Any]) -> str:
    """13, or 13 of 14 where images of the split were left out or cannot be read."""
    lost = reference.get("unreadable") or {}
    count, total = reference["images"], lost.get("of", reference.get("split_images"))
    return f"{count:,}" if total in (None, count) else f"{count:,} of {total:,}"


def _quality(found: Mapping[str, Any] | None) -> str:
    """Retrieval scores of the CLIP model of the features, if its run has them."""
    if not found or "recall_1_of_50" not in found:
        return ""
    chance = f", by chance {found['chance_recall_1_of_50']:.0%}" if "chance_recall_1_of_50" in found else ""
    return f" (finds the caption among 50 for {found['recall_1_of_50']:.0%} of validation images{chance})"


def _split(result: Mapping[str, Any]) -> str:
    return "validation" if result["reference"]["split"] == "val" else "training"


def _samples(result: Mapping[str, Any], folder: Path) -> list[Block]:
    samples, real = result["images"]["samples"], result["images"]["real"]
    if not samples:
        return []
    if "steps" not in result["sampling"]:
        note = "Each pair: the reconstruction, and the original."
    elif result["sampling"]["conditions"] == "reference" and any(item["caption"] for item in samples):
        note = f"Each pair: generated from the caption, and the {_split(result)} image that has this caption."
    else:
        return [
            _gallery(folder, [Card(((item["file"], ""),)) for item in items], "cards", name)
            for name, items in (("Generated", samples), (f"Real ({_split(result)})", real))
        ]
    cards = [
        Card(((one["file"], one["caption"]), (other["file"], one["caption"])), one["caption"])
        for one, other in zip(samples, real, strict=True)
    ]
    return [Text(note), _gallery(folder, cards, "pairs")]


def _gallery(folder: Path, cards: list[Card], style: str, heading: str = "") -> Gallery:
    return Gallery(folder, tuple(cards), style, heading)


def _scores(result: Mapping[str, Any]) -> Section:
    features = result["features"]
    note = f"Features: {features['name']}, {features['width']} wide. ↓ lower is better, ↑ higher."
    rows = tuple(Row("theirs", one.head, (one.value, one.meaning, one.note)) for one in score_lines(result))
    return Section("Scores", [Table("Scores", ("value", "meaning", "note"), rows, (note,), "score", True)])


def _memorisation(result: Mapping[str, Any], folder: Path) -> list[Block]:
    """The fraction of suspected copies, and pairs of images."""
    found = result.get("neighbours")
    if not found:
        return []
    lead = f"Each image with the nearest of all {found['training_images']:,} training images (cosine distance). "
    blocks: list[Block] = [Text(lead + copies_sentence(found))]
    for name, left, note in _GROUPS:
        if found.get(name):
            cards = [_pair(pair, left, found["bar"]) for pair in found[name]]
            blocks += [Text(note), _gallery(folder, cards, "pairs")]
    return blocks


def copies_sentence(found: Mapping[str, Any]) -> str:
    """The fraction of copies and the distances behind it."""
    if found["copies"] is None:
        return "No held-out set, so no threshold."
    expected = ""
    if found.get("expected") is not None:
        expected = f" ({found['expected']:.1%} ± {found['error']:.1%} expected of images never seen in training)"
    return (
        f"{found['copies']:.1%} of all samples{expected} are nearer to a training image than {found['bar']:.3g}, the "
        f"threshold set by held-out images; half of the samples are within {found['median_distance_samples']:.3g} "
        f"of one, half of the held-out images within {found['median_distance_held_out']:.3g}."
    )


def _pair(pair: Mapping[str, Any], left: str, bar: float | None) -> Card:
    words = f"“{pair['caption']}” beside “{pair['train_caption']}”, {pair['distance']:.3g}"
    mark = "copy" if left == "sample" and bar is not None and pair["distance"] < bar else ""
    return Card(tuple((pair[side], words) for side in (left, "train")), words, mark)


def _extras(result: Mapping[str, Any], folder: Path) -> list[Block]:
    items = result["images"].get("extras") or []
    return [_gallery(folder, [Card(((one["file"], one["title"]),), one["title"])], "wide") for one in items]


def _training(result: Mapping[str, Any], folder: Path) -> list[Block]:
    blocks: list[Block] = []
    for run in result.get("curves") or []:
        path = folder / run["file"]
        inside = path.resolve().is_relative_to(folder.resolve())
        if inside and path.is_file() and (charts := run_charts(path)):
            blocks.append(Charts(charts[:_FIRST_CHARTS], charts[_FIRST_CHARTS:], run["title"]))
    return blocks


def _buckets(result: Mapping[str, Any]) -> list[Block]:
    """Scores by size of the hole."""
    buckets = (result.get("buckets") or {}).values()
    columns = list(dict.fromkeys(name for bucket in buckets for name in bucket["scores"]))
    rows = tuple(
        Row(
            "theirs",
            f"{bucket['hole'][0]:.0%} to {bucket['hole'][1]:.0%}",
            (f"{bucket['images']:,}", *(_value(bucket["scores"].get(name)) for name in columns)),
        )
        for bucket in buckets
    )
    note = "Each size is compared with its own originals alone, so its distance rests on fewer images."
    heads = tuple(score_line(name, {"value": 0.0}, result).head for name in columns)
    return [Table("By size of the hole", ("images", *heads), rows, (note,), "hole")] if rows else []


def _value(score: Mapping[str, Any] | None) -> str:
    return DASH if score is None else number_text(score["value"])


def _paper(result: Mapping[str, Any]) -> list[Block]:
    tables = paper_report([result])
    if not tables:
        return []
    if (result.get("paper") or {}).get("comparable"):
        return [Text("Our row meets every condition of the paper's measurement that is known."), *tables]
    return [Text("not comparable", stamp=True), *tables]


def _open(result: Mapping[str, Any]) -> list[Block]:
    """Settings that the paper leaves open."""
    pairs = [(str(name), str(text)) for name, text in (result["protocol"].get("leaves_open") or {}).items()]
    return [Table.of_pairs(pairs)] if pairs else []


def settings_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All settings that determine the scores, in reading order."""
    reference, features = result["reference"], result["features"]
    rows = [(f"sampling: {name}", str(value)) for name, value in result["sampling"].items()]
    rows += [(f"model: {name}", str(value)) for name, value in result["model"].items()]
    rows += [("protocol: changed", str(text)) for text in result["protocol"].get("changed") or ()]
    source = f"{images_of(reference)} images of {reference['split']}, {reference['image_size']} px"
    transform = ", ".join(f"{name} {value}" for name, value in (reference.get("transform") or {}).items())
    rows += [
        ("reference", source),
        *([("reference: unreadable", _lost(reference["unreadable"]))] if reference.get("unreadable") else []),
        ("reference: manifest", str(reference.get("manifest_hash"))),
        ("reference: preparation", transform or "not recorded"),
        *([("reference: resized", str(reference["resized"]))] if reference.get("resized") else []),
        ("reference: source", str(reference.get("source"))),
        ("features", f"{features['name']}, {features['width']} wide, weights {features['weights_hash']}"),
        *_more_networks(result),
        ("time", f"{result.get('seconds')} s"),
    ]
    made = result["provenance"]
    rows += [("command", str(made["command"])), ("commit", str(made["commit"])), ("date", str(made["time_utc"]))]
    return [*rows, ("versions", ", ".join(f"{name} {version}" for name, version in made["packages"].items()))]


def _lost(unreadable: Mapping[str, Any]) -> str:
    names = ", ".join(map(str, unreadable.get("names") or ()))
    return f"{unreadable['count']:,} of {unreadable['of']:,} images{f': {names}' if names else ''}"


def _more_networks(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Preparation of images for the feature network, the CLIP model, and the network of LPIPS."""
    features, perceptual = result["features"], result.get("perceptual")
    rows = [("features: images", str(features["preparation"]))] if "preparation" in features else []
    if "text_name" in features:
        rows.append(("features: CLIP", f"{features['text_name']}, weights {features['text_weights_hash']}"))
    if "perceptual" in result:
        absent = "left out: its VGG weights are not on this machine"
        rows.append(("LPIPS", f"{perceptual['name']}, weights {perceptual['weights_hash']}" if perceptual else absent))
    return rows
