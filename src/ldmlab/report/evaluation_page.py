"""One evaluation as a page: images first, then scores, then all settings."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.report.conditioning_section import accuracy_lines, conditioning, inputs_and_samples
from ldmlab.report.metrics_json import reading, title
from ldmlab.report.page_content import DASH, Block, Card, Charts, Gallery, Page, Row, Section, Table, Text
from ldmlab.report.paper_table import paper_report
from ldmlab.report.score_curves import over_scales, run_charts
from ldmlab.report.score_lines import ScoreLine, control_text, features_text, number_text, score_line, warnings_of

_FIRST_CHARTS = 6  # of a run; the others are folded away
_GROUPS = (  # of pairs with training images; older records have only `pairs`
    ("closest", "sample", "The samples nearest to a training image, of all that were generated."),
    ("held_out", "held_out", "Held-out real images at the threshold: as near as these two different images are."),
    ("pairs", "sample", "Ordinary samples with the training images nearest to them."),
)


def evaluation_page(result: Mapping[str, Any]) -> Page:
    """The page of one record; a damaged part is an InputError that names the part."""
    record = Path(result["folder"]) / "metrics.json"
    parts = {
        "images": _images,
        "scores": _scores,
        "given": inputs_and_samples,
        "evaluators": conditioning,
        "curves over scales": over_scales,
        "neighbours": _memorisation,
        "extras": _extras,
        "curves": _training,
        "buckets": _buckets,
        "paper": _paper,
        "leaves_open": _open,
        "settings": _settings,
    }
    sections = []
    for name, part in parts.items():
        with reading(record, name):
            sections += part(result)
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
    """Description of the images of the page, and of the CLIP model of the features where its run has scores."""
    sampling, beside = result["sampling"], f"{_count(result)} {_split(result)} images"
    features = f"Features: {features_text(result['features'])}"
    if "steps" not in sampling:
        return f"Reconstructions of {beside} of {sampling['size']} px, compared with the originals. {features}."
    scale = sampling["guidance_scale"]
    return (
        f"{sampling['images']:,} images of {sampling['size']} px, {sampling['steps']} {sampling['sampler'].upper()} "
        f"steps, guidance scale {scale:g}, eta {sampling['eta']:g}, {result['model'].get('weights', '')} "
        f"weights, compared with {beside}. {features}."
    )


def _count(result: Mapping[str, Any]) -> str:
    """13, or 13 of 14 where images of the split were left out or cannot be read."""
    reference = result["reference"]
    count, total = reference["images"], (reference.get("unreadable") or {}).get("of", reference.get("split_images"))
    return f"{count:,}" if total in (None, count) else f"{count:,} of {total:,}"


def _split(result: Mapping[str, Any]) -> str:
    return "validation" if result["reference"]["split"] == "val" else "training"


def _images(result: Mapping[str, Any]) -> list[Section]:
    folder, samples, real = Path(result["folder"]), result["images"]["samples"], result["images"]["real"]
    note, heading = "", "Generated and real"
    if not samples:
        return []
    if "steps" not in result["sampling"]:
        note = "Each pair: the reconstruction, and the original."
    elif result["sampling"]["conditions"] == "reference" and any(item["caption"] for item in samples):
        note = f"Each pair: generated from the caption, and the {_split(result)} image that has this caption."
    if not note:
        both = {"Generated": samples, f"Real ({_split(result)})": real}
        cards = {name: [Card([(item["file"], "")]) for item in items] for name, items in both.items()}
        return [Section(heading, [Gallery(folder, cards[name], "cards", name) for name in both])]
    pairs = [
        Card([(one["file"], one["caption"]), (other["file"], one["caption"])], one["caption"])
        for one, other in zip(samples, real, strict=True)
    ]
    return [Section(heading, [Text(note), Gallery(folder, pairs, "pairs")])]


def _scores(result: Mapping[str, Any]) -> list[Section]:
    features = result["features"]
    note = f"Features: {features['name']}, {features['width']} wide. ↓ lower is better, ↑ higher."
    rows = []
    for one in score_lines(result):
        beside = [value for _, value in control_text(one.name, result)]
        rows.append(Row("theirs", one.head, [one.value, *beside, one.meaning, one.note]))
    columns = ["value", *(title for title, _ in control_text("", result)), "meaning", "note"]
    notes = [note]
    if found := result.get("controls"):
        counts = ", ".join(f"{one['images']:,} of {one['title']}" for one in found.values())
        notes.append(f"Controls, scored like the samples: {counts}. A score close to that of noise says little.")
    warned = [Text(f"Warning: {text}", stamp=True) for text in warnings_of(result)]
    return [Section("Scores", [*warned, Table("Scores", columns, rows, notes, "score", True)])]


def _memorisation(result: Mapping[str, Any]) -> list[Section]:
    """The fraction of suspected copies, and pairs of images."""
    found = result.get("neighbours")
    if not found:
        return []
    lead = f"Each image with the nearest of all {found['training_images']:,} training images (cosine distance). "
    blocks: list[Block] = [Text(lead + copies_text(found))]
    for name, left, note in _GROUPS:
        cards = []
        for pair in found.get(name) or ():
            words = f"“{pair['caption']}” beside “{pair['train_caption']}”, {pair['distance']:.3g}"
            copy = left == "sample" and found["bar"] is not None and pair["distance"] < found["bar"]
            cards.append(Card([(pair[side], words) for side in (left, "train")], words, "copy" if copy else ""))
        blocks += [Text(note), Gallery(Path(result["folder"]), cards, "pairs")] if cards else []
    return [Section("Memorisation", blocks)]


def copies_text(found: Mapping[str, Any]) -> str:
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


def _extras(result: Mapping[str, Any]) -> list[Section]:
    cards = [Card([(one["file"], one["title"])], one["title"]) for one in result["images"].get("extras") or ()]
    return [Section("More images", [Gallery(Path(result["folder"]), [card], "wide") for card in cards])]


def _training(result: Mapping[str, Any]) -> list[Section]:
    folder, blocks = Path(result["folder"]), []
    for run in result.get("curves") or []:
        path = folder / run["file"]
        inside = path.resolve().is_relative_to(folder.resolve())
        if inside and path.is_file() and (charts := run_charts(path)):
            blocks.append(Charts(charts[:_FIRST_CHARTS], charts[_FIRST_CHARTS:], run["title"]))
    return [Section("Training", blocks)]


def _buckets(result: Mapping[str, Any]) -> list[Section]:
    heading, buckets = "By size of the hole", (result.get("buckets") or {}).values()
    names = list(dict.fromkeys(name for bucket in buckets for name in bucket["scores"]))
    rows = []
    for bucket in buckets:
        scores = [bucket["scores"].get(name) for name in names]
        cells = [DASH if score is None else number_text(score["value"]) for score in scores]
        low, high = bucket["hole"]
        rows.append(Row("theirs", f"{low:.0%} to {high:.0%}", [f"{bucket['images']:,}", *cells]))
    note = "Each size is compared with its own originals alone, so its distance rests on fewer images."
    heads = [score_line(name, {"value": 0.0}, result).head for name in names]
    return [Section(heading, [Table(heading, ["images", *heads], rows, [note], "hole")])] if rows else []


def _paper(result: Mapping[str, Any]) -> list[Section]:
    tables = paper_report([result])
    first = Text("not comparable", stamp=True)
    if (result.get("paper") or {}).get("comparable"):
        first = Text("Our row meets every condition of the paper's measurement that is known.")
    return [Section("The paper's tables", [first, *tables] if tables else [])]


def _open(result: Mapping[str, Any]) -> list[Section]:
    pairs = [(str(name), str(text)) for name, text in (result["protocol"].get("leaves_open") or {}).items()]
    heading = "What the paper leaves open, and the choice here"
    return [Section(heading, [Table.of_pairs(pairs)] if pairs else [])]


def _settings(result: Mapping[str, Any]) -> list[Section]:
    """All settings that determine the scores, in reading order."""
    reference, features, made = result["reference"], result["features"], result["provenance"]
    rows = [(f"sampling: {name}", value) for name, value in result["sampling"].items()]
    rows += [(f"model: {name}", value) for name, value in result["model"].items()]
    rows += [("protocol: changed", text) for text in result["protocol"].get("changed") or ()]
    rows.append(("reference", f"{_count(result)} images of {reference['split']}, {reference['image_size']} px"))
    if lost := reference.get("unreadable"):
        names = ", ".join(map(str, lost.get("names") or ()))
        text = f"{lost['count']:,} of {lost['of']:,} images"
        rows.append(("reference: unreadable", f"{text}: {names}" if names else text))
    transform = ", ".join(f"{name} {value}" for name, value in (reference.get("transform") or {}).items())
    rows += [
        ("reference: manifest", reference.get("manifest_hash")),
        ("reference: preparation", transform or "not recorded"),
        *([("reference: resized", reference["resized"])] if reference.get("resized") else []),
        ("reference: source", reference.get("source")),
        ("features", f"{features['name']}, {features['width']} wide, weights {features['weights_hash']}"),
        *_more_networks(result),
        ("time", f"{result.get('seconds')} s"),
        *(("command", made["command"]), ("commit", made["commit"]), ("date", made["time_utc"])),
        ("versions", ", ".join(f"{name} {version}" for name, version in made["packages"].items())),
    ]
    return [Section("Settings and origin", [Table.of_pairs([(name, str(value)) for name, value in rows])])]


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
