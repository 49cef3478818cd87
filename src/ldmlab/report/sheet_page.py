"""A data sheet as Markdown."""

from collections.abc import Mapping
from typing import Any

from ldmlab.report.page_content import DASH, Block, Page, Row, Section, Table, Text
from ldmlab.report.render import markdown

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
