"""A model card and a data sheet as Markdown.

A card holds what a person has written about a model, then what was recorded of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ldmlab.report.evaluation_page import copies_text, score_lines
from ldmlab.report.metrics_json import measurement_line
from ldmlab.report.page_content import DASH, Block, Page, Row, Section, Table, Text
from ldmlab.report.render import markdown
from ldmlab.report.score_curves import over_scales
from ldmlab.report.score_lines import number_text, share_text

PERSON = {  # fields of card.yaml => what belongs there
    "intended_use": "who should use the model for what, and what it is not for",
    "limits": "what it does badly, on which inputs, and what was not tested",
    "risks": "what can go wrong for people: deception, depicted persons, bias, copies of training images",
    "licence": "of these weights, and why the licences of the data allow it",
    "attribution": "the line that each source of the data asks for; none where none does",
}
_PARTS = {"latent_diffusion": "denoiser", "first_stage": "first stage", "clip": "CLIP", "classifier": "classifier"}
_HEADS = ("first", "1/4", "1/2", "3/4", "last")
SHARES = {"copies": "copies", "held_out_copies": "of held-out images", "extracted": "extracted captions"}  # of an audit
_EMPTY = "Not stated yet: "


def section_title(name: str) -> str:
    """Of a field of PERSON."""
    return name.replace("_", " ").capitalize()


def card_markdown(person: Mapping[str, Sequence[str]], facts: Mapping[str, Any]) -> str:
    """The sections below a card's head; person: paragraphs by field of PERSON."""
    sections = [
        Section(section_title(name), [Text(text) for text in person.get(name) or [_EMPTY + what + "."]])
        for name, what in PERSON.items()
    ]
    runs = {_part(kind): run for kind, run in facts.get("runs", {}).items()}
    sections += [_data(runs), *_training(runs)]
    for name, result in facts.get("evaluations", {}).items():
        sections.append(Section(f"Scores: {name}", _scores(result)))
    sections += [_memorisation(facts)]
    text = markdown(Page("", "", [section for section in sections if section.blocks]))
    return text[text.index("\n## ") + 1 :]


def _part(key: str) -> str:
    """`first_stage` => first stage; `first_stage:1` is the run with whose weights that one began."""
    kind, _, number = key.partition(":")
    return _PARTS.get(kind, kind) + (f", {number} before" if number else "")


def _data(runs: Mapping[str, Mapping[str, Any]]) -> Section:
    """Of each part and split: images, source, licence, hash of the data sheet; the sheet's licences."""
    rows, notes, licences = [], [], dict[str, Any]()
    for part, run in runs.items():
        for split, found in (run["data"] or {}).items():
            sheet = found.get("sheet") or {}
            licences |= sheet.get("licences") or {}
            licence = found["licence"] or ("by field, below" if licences else "not recorded")
            cells = [f"{found['images']:,}", found["source"], licence, found["manifest"][:12]]
            rows.append(Row("theirs", f"{part}: {split}", [*cells, sheet.get("hash", "none made")[:12]]))
        if not run["data"]:
            notes.append(f"The data of the {part} were not recorded and are no longer there.")
    heads = ["images", "source", "licence", "manifest", "data sheet"]
    blocks: list[Block] = [Table("", heads, rows, (), "part: split", True)] if rows else []
    if licences:
        counts = [Row("theirs", str(name), [f"{count:,}"]) for name, count in licences.items()]
        blocks.append(Table("Licences by the data sheet", ["images"], counts, (), "licence"))
    return Section("Data", [*blocks, *map(Text, notes)])


def _training(runs: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    cost = [Row("theirs", part, _cost(run)) for part, run in runs.items()]
    heads = ["parameters", "steps", "images seen", "hours", "hardware", "PFLOP"]
    notes = ["Hours are those of training steps, without validation."]
    if "denoiser" in runs and "first stage" not in runs:
        notes.append("The training of its first stage is not part of this card.")
    sections = [Section("Cost", [Table("", heads, cost, notes, "part")] if cost else [])]
    for part, run in runs.items():
        made = [
            ("trained", run["time_utc"]),
            ("commit", run["commit"]),
            ("torch", (run["packages"] or {}).get("torch")),
            ("began with the weights of", run.get("init_from")),
        ]
        pairs = [(name, str(value)) for name, value in [*run["settings"].items(), *made] if value is not None]
        blocks: list[Block] = [Table.of_pairs(pairs)]
        if run["curves"]:
            rows = [Row("theirs", name, _points(points)) for name, points in run["curves"].items()]
            last = [f"Steps of each line at equal distances, to step {run['step']:,}."]
            blocks.append(Table("Training curves", _HEADS, rows, last, "metric"))
        sections.append(Section(f"Training of the {part}", blocks))
    return sections


def _cost(run: Mapping[str, Any]) -> list[str]:
    cost, ended = run["cost"], "" if run["finished"] else ", unfinished"
    where = f"{cost['devices']} x {cost['hardware'] or 'not recorded'}"
    pflop = DASH if cost["pflop"] is None else f"{cost['pflop']:g}"
    parameters = f"{run['fields']['parameters']:,}"
    return [parameters, f"{run['step']:,}{ended}", f"{cost['images']:,}", f"{cost['hours']:g}", where, pflop]


def _points(points: Sequence[tuple[float, float]]) -> list[str]:
    """Of fewer points than columns the last one stays in the last column."""
    texts = [number_text(value) for _, value in points]
    return [*texts[:-1], *[DASH] * (len(_HEADS) - len(texts)), texts[-1]]


def _scores(result: Mapping[str, Any]) -> list[Block]:
    rows = [Row("theirs", line.head, [line.value, line.note]) for line in score_lines(result)]
    known = result["sampling"]
    settings = ", ".join(f"{name} {value}" for name, value in known.items() if value is not None and name != "hardware")
    blocks: list[Block] = [
        Table("", ["value", "note"], rows, [f"{measurement_line(result)}; {settings}."], "score", True)
    ]
    return blocks + [block for section in over_scales(result) for block in section.blocks]


def _memorisation(facts: Mapping[str, Any]) -> Section:
    """What evaluations and the audit found of copies."""
    found = {name: result["neighbours"] for name, result in facts.get("evaluations", {}).items()}
    blocks: list[Block] = [Text(f"{name}: {copies_text(near)}") for name, near in found.items() if near]
    if audit := facts.get("audit"):
        rows = [Row("theirs", one["label"], [share_text(one[name]) for name in SHARES]) for one in audit["audits"]]
        blocks.append(Table("Audit", list(SHARES.values()), rows, audit["advice"], "model"))
    return Section("Memorisation", blocks or [Text("Not measured: ldmlab audit MODEL does.")])


_NOT_MEASURED = (
    "Faces and unsafe content were not measured: ldmlab brings no classifier for them. Write what a detector of your "
    "choice finds into a field of KEY.json, such as faces, count it with --count faces, and name the detector."
)
_DUPLICATES = (
    "Images of the split on the left that occur again in the split above; in their own one, besides themselves. Exact: "
    "equal pixels. Near: perceptual hashes (pHash, 64 bits) that differ in {bits} bits or less: other sizes "
    "and compressions of an image, and also images that are alike for other reasons: look at the examples."
)


def sheet_markdown(sheet: Mapping[str, Any]) -> str:
    splits: Mapping[str, Any] = sheet["splits"]
    images = sum(one["images"] for one in splits.values())
    lead = f"{images:,} images in {len(splits)} split{'s' * (len(splits) > 1)}. Hash of this sheet: {sheet['hash']}."
    sections = [
        Section("Splits", [_splits(splits)]),
        Section("Sources and licences", [_counted("source", sheet["sources"]), _counted("licence", sheet["licences"])]),
        Section("Captions", [_captions(splits)]),
        Section("Duplicates", _duplicates(sheet["duplicates"])),
        Section("People and unsafe content", [Text(_NOT_MEASURED)]),
        Section("Counted fields", [_counted(name, counts) for name, counts in sheet["counts"].items()]),
        Section("Opt-out lists", [_opt_out(splits)]),
    ]
    return markdown(Page("Data sheet", lead, sections))


def _splits(splits: Mapping[str, Any]) -> Table:
    rows = []
    for name, one in splits.items():
        mebibytes = f"{one['bytes'] / 2**20:,.1f}"
        cells = [f"{one['images']:,}", f"{one['unreadable']:,}", _range(one["side"]), mebibytes, one["manifest"][:12]]
        rows.append(Row("theirs", name, cells))
    return Table("", ["images", "unreadable", "shorter side, px", "MiB", "manifest"], rows, (), "split")


def _range(found: Mapping[str, float] | None) -> str:
    """Least, median and most."""
    if found is None:
        return DASH
    same = found["least"] == found["most"]
    return f"{found['least']:g}" if same else f"{found['least']:g} .. {found['median']:g} .. {found['most']:g}"


def _counted(name: str, counts: Mapping[str, int]) -> Table:
    return Table("", ["images"], [Row("theirs", value, [f"{count:,}"]) for value, count in counts.items()], (), name)


def _captions(splits: Mapping[str, Any]) -> Table:
    rows, notes = [], []
    for name, one in splits.items():
        found = one["captions"]
        counts = [f"{found[key]:,}" for key in ("count", "distinct", "images_without")]
        rows.append(Row("theirs", name, [*counts, _range(found["words"])]))
        if found["frequent_words"]:
            notes.append(
                f"{name}: " + ", ".join(f"{word} {count:,}" for word, count in found["frequent_words"].items())
            )
    return Table("", ["captions", "distinct", "images without", "words: least .. median .. most"], rows, notes, "split")


def _duplicates(found: Mapping[str, Any]) -> list[Block]:
    blocks: list[Block] = [Text(_DUPLICATES.format(bits=found["near_bits"]))]
    for kind in ("exact", "near"):
        rows = [Row("theirs", s, [f"{count:,}" for count in row.values()]) for s, row in found[kind].items()]
        examples = [f"{one} in {s}, {other} in {t}" for s, one, t, other in found[f"{kind}_examples"]]
        blocks.append(Table(f"{kind.capitalize()} duplicates", list(found[kind]), rows, examples, "split"))
    return blocks


def _opt_out(splits: Mapping[str, Any]) -> Block:
    rows = []
    for name, one in splits.items():
        if listed := one["opt_out"]:
            counts = ", ".join(f"{count:,} by {way}" for way, count in listed["left_out"].items())
            rows.append(Row("theirs", name, [listed["list"], listed["sha256"][:12], f"{listed['entries']:,}", counts]))
    if not rows:
        return Text("None was applied when these shards were packed (ldmlab pack --exclude FILE).")
    return Table("", ["list", "SHA-256", "entries", "images left out"], rows, (), "split", True)
