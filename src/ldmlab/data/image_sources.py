"""Where images come from: a table, caption files, a folder per class, plain folders, or tars."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ldmlab.data import listings
from ldmlab.data.decode import BAD_SAMPLE, checked_fields, clean_fields, is_no_caption, sample_fields
from ldmlab.data.image_parts import MAPS
from ldmlab.data.tars import IMAGE_ENDINGS, read_range, scan_tar
from ldmlab.errors import InputError
from ldmlab.files import read_text
from ldmlab.stored_names import is_overview

MAP_COLUMNS = {"mask_file_name": MAPS["mask"], "segmentation_file_name": MAPS["segmentation"]}
LAYOUTS = ("auto", "table", "captions", "classes", "plain", "tars")
_CAPTION_ENDINGS = (".txt", ".caption", ".TXT", ".CAPTION", ".Txt")
_KEY_LENGTH = 80  # tar names of the plain format end at 100 bytes


@dataclass(frozen=True)
class Item:
    """One image to pack: a file, or a byte range of a tar."""

    key: str  # unique, letters digits _ -
    name: str  # shown in messages
    path: str
    fields: dict[str, Any] = field(default_factory=dict)
    span: tuple[int, int] | None = None  # bytes of the sample if `path` is a tar
    fault: str | None = None  # known before it is opened
    maps: dict[str, str] = field(default_factory=dict)  # files that lie on it, by ending: seg.png, mask.png
    caption: str | None = None  # field of a tar's sample that becomes its caption; "none": it gets none
    urls: tuple[str, ...] = ()  # of other rows of the same file, for opt-out lists


@dataclass(frozen=True)
class Source:
    """All images of a SOURCE in a fixed order."""

    layout: str
    items: list[Item]
    classes: list[str] | None = None  # names by class_id
    left_out: int = 0  # images without a row
    notes: tuple[str, ...] = ()  # remarks on the listing for the user


def list_source(
    source: Path,
    layout: str = "auto",
    file_column: str | None = None,
    caption: str | None = None,  # column, or field of a tar's samples; "none" for images without captions
    only: Path | None = None,  # text file of names to take
) -> Source:
    """Detects the layout where it is "auto", and lists the images."""
    if re.match(r"\w+:/", str(source)):
        raise InputError(f"SOURCE={source} is an address; ldmlab reads from disks: copy it or mount the store.")
    if not source.exists():
        raise InputError(f"SOURCE={source} does not exist; give a folder, a table or a tar.")
    layout = _detect(source) if layout == "auto" else layout
    if layout == "table":
        found = _table(source, file_column, caption)
    else:
        tars = layout == "tars"
        given = {"--file-field": file_column, "--caption-field": None if tars else caption}
        if unused := [f"{option} {name}" for option, name in given.items() if name is not None]:
            what = "tars name their own files" if tars else f"SOURCE={source} is read as --layout {layout}"
            raise InputError(f"{unused[0]}: {what} and no table; leave it out, or give a table.")
        found = _tars(source, caption) if tars else _folders(source, layout)
    if only is not None:
        found = _restrict(found, only)
    if not found.items:
        what = "images in tars" if layout == "tars" else f"images ({', '.join(IMAGE_ENDINGS)})"
        raise InputError(f"SOURCE={source} holds no {what}; give another folder, or another --layout than {layout}.")
    return found


def _detect(source: Path) -> str:
    if source.suffix == ".tar":
        return "tars"
    if listings.find_table(source):
        return "table"
    if not source.is_dir():
        raise InputError(
            f"SOURCE={source} is neither a folder nor a .jsonl, .csv, .tsv or .tar file; give one of these."
        )
    if any(source.glob("*.tar")):
        return "tars"
    images = [name for name, _ in listings.walk_images(source)]
    if any(_caption_file(source / name) for name in images):
        return "captions"
    depths = [len(Path(name).parts) - 1 for name in images]
    folders = {Path(name).parts[0] for name, depth in zip(images, depths, strict=True) if depth == 1}
    if len(folders) > 1 and max(depths) == 1:
        if 2 * depths.count(0) > len(depths):
            raise InputError(
                f"SOURCE={source} holds folders like classes ({', '.join(sorted(folders)[:3])}) and images next to "
                "them; give --layout classes to leave those out, or --layout plain for images without classes."
            )
        return "classes"
    return "plain"


def _folders(source: Path, layout: str) -> Source:
    found = dict(listings.walk_images(source))
    names, classes = sorted(name for name in found if not is_overview(source / name)), None
    notes = [
        f"{path.name} is not read because it has no header; write file_name,caption as its first line, or save it as "
        "metadata.csv"
        for path in (sorted(source.iterdir()) if source.is_dir() else ())
        if path.name.lower() in listings.LISTS
    ]
    if grids := len(found) - len(names):
        notes.append(f"{grids} grids and trajectories beside samples of `ldmlab sample` are left out")
    if layout == "classes":
        beside = [name for name in names if len(Path(name).parts) == 1]
        names = [name for name in names if len(Path(name).parts) > 1]
        classes = sorted({Path(name).parts[0] for name in names})
        if beside:
            few = ", ".join(beside[:3]) + (", ..." if len(beside) > 3 else "")
            notes.append(
                f"{len(beside)} images next to the class folders are left out ({few}); move them into a folder, or "
                "give --layout plain to pack all images without classes"
            )
    number = {name: index for index, name in enumerate(classes or ())}
    items = []
    for key, name in zip(unique_keys(names), names, strict=True):
        shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        fields: dict[str, Any] = {"file_name": shown}
        fault = None
        if classes is not None:
            fields |= {"class": Path(name).parts[0], "class_id": number[Path(name).parts[0]]}
        elif layout == "captions":
            fields["caption"], fault = _caption_beside(source / name)
        fault = "has no image next to it" if listings.map_ending(name) else fault
        maps = {ending: str(source / beside) for ending, beside in found[name].items()}
        items.append(Item(key, shown, str(source / name), fields, fault=fault, maps=maps))
    return Source(layout, items, classes, notes=tuple(notes))


def _caption_file(image: Path) -> Path | None:
    """NAME.txt, NAME.caption or NAME.jpg.txt next to an image, in small or capital letters."""
    beside = (*(image.with_suffix(ending) for ending in _CAPTION_ENDINGS), Path(f"{image}.txt"))
    return next((path for path in beside if path.is_file()), None)


def _caption_beside(image: Path) -> tuple[str | None, str | None]:
    """The caption, or what is wrong with it."""
    path = _caption_file(image)
    if path is None:
        return None, "has no caption file next to it, as --layout captions has"
    try:
        text = read_text(path, "utf-8-sig").strip()
    except UnicodeDecodeError:
        return None, "its caption file is not UTF-8"
    except OSError as error:
        return None, f"its caption file cannot be read ({(error.strerror or str(error)).lower()})"
    return (None, "its caption file holds no caption") if is_no_caption(text) else (text, None)


def _table(source: Path, file_column: str | None, caption: str | None) -> Source:
    path = listings.find_table(source)
    if path is None:
        raise InputError(f"SOURCE={source} has no metadata.jsonl, .csv or .tsv; add one or choose another --layout.")
    rows = listings.read_table(path)
    file_column = listings.pick_column(rows, file_column, listings.FILE_COLUMNS, "--file-field", path)
    if caption != "none":
        option = "--caption-field (none: no captions)"
        caption = listings.pick_column(rows, caption, listings.CAPTION_COLUMNS, option, path)
    rows = [clean_fields(row) for row in rows]
    names = [str(row.get(file_column) or "") for row in rows]
    items: list[Item] = []
    found, listed = dict(listings.walk_images(path.parent)), set[str]()
    for key, name, row in zip(unique_keys(names), names, rows, strict=True):
        own = {column: row[column] for column in MAP_COLUMNS if row.get(column)}
        fields = {"file_name": name} | {c: value for c, value in row.items() if c != file_column and c not in own}
        fault = None if name else "its row names no file"
        if caption not in (None, "none"):
            captions, problem = _captions(row.get(caption or ""))
            fields, fault = fields | captions, fault or problem
        if isinstance(fields.get("boxes"), str):
            with suppress(ValueError):  # of a CSV, written as JSON; other text is refused with its image
                fields["boxes"] = json.loads(fields["boxes"])
        beside = _beside(path.parent, name, found) | {MAP_COLUMNS[column]: str(file) for column, file in own.items()}
        listed |= {os.path.normpath(file) for file in (name, *beside.values())}
        maps = {ending: str(path.parent / file) for ending, file in beside.items()}
        shown = name or f"row {len(items) + 1}"
        items.append(Item(key, shown, str(path.parent / name), fields, fault=fault, maps=maps))
    return Source("table", items, left_out=sum(name not in listed for name in found))


def _beside(folder: Path, name: str, found: Mapping[str, dict[str, str]]) -> dict[str, str]:
    """Maps of an image that a row names, be it below the folder or elsewhere."""
    if os.path.normpath(name) in found:
        return found[os.path.normpath(name)]
    stem = os.path.splitext(name)[0]
    return {e: f"{stem}.{e}" for e in MAPS.values() if name and os.path.isfile(folder / f"{stem}.{e}")}


def _captions(value: Any) -> tuple[dict[str, Any], str | None]:
    """One caption, and all of them where a row holds a list; what is wrong with it."""
    if is_no_caption(value):
        return {"caption": None}, "its row has no caption"
    try:
        return checked_fields({"caption": value}), None
    except ValueError as error:
        return {"caption": None}, str(error)


def _tars(source: Path, caption: str | None) -> Source:
    names: list[str] = []
    spans: list[tuple[Path, tuple[int, int]]] = []
    for path in [source] if source.is_file() else sorted(source.glob("*.tar")):
        info, found = scan_tar(path)
        names += [f"{path.name}/{key}" for key in found]
        spans += [(path, info.byte_range(sample)) for sample in range(info.samples)]
    keys = unique_keys([name.partition("/")[2] + ".tar" for name in names], names)
    named = zip(keys, names, spans, strict=True)
    return Source("tars", [Item(k, n, str(path), span=span, caption=caption) for k, n, (path, span) in named])


def with_fields(item: Item) -> Item:
    """The item with the fields its tar holds; other items have them already."""
    if item.span is None:
        return item
    try:
        return replace(item, fields=captioned(sample_fields(read_range(item.path, *item.span)[1]), item.caption))
    except BAD_SAMPLE as error:
        return replace(item, fields={}, fault=f"its fields cannot be read ({error})")


def captioned(fields: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Fields whose caption is that of field `name`; "none": without a caption; ValueError where there is none."""
    if name in (None, "caption"):
        return fields
    rest = {field: value for field, value in fields.items() if field not in ("caption", "captions")}
    if name == "none":
        return rest
    if is_no_caption(fields.get(name)):
        raise ValueError(f"it has no {name} for its caption (it has {', '.join(sorted(rest)) or 'no fields'})")
    return checked_fields({**rest, "caption": fields[name]})


def _restrict(source: Source, only: Path) -> Source:
    """The images that a list names, by path, file name or key, in the source's order."""
    listed = listings.read_text(only, f"list={only}", "give a text file with one name a line").split("\n")
    listed_names, met = {line.strip() for line in listed if line.strip()}, set[str]()
    items = []
    for item in source.items:
        if names := {item.name, os.path.basename(item.name), item.key} & listed_names:
            met |= names
            items.append(item)
    if missing := sorted(listed_names - met):
        few = ", ".join(missing[:3])
        raise InputError(f"list={only} names {len(missing)} images that SOURCE does not hold ({few}); fix the list.")
    return replace(source, items=items)


def unique_keys(names: list[str], origins: list[str] | None = None) -> list[str]:
    """Keys from relative names: no dot or slash, the folder shared by all left out, a hash where two would meet."""
    mixed = len({os.path.isabs(name) for name in names}) > 1
    shared = os.path.commonpath([os.path.dirname(name) for name in names]) if names and not mixed else ""
    stems = [os.path.splitext(os.path.relpath(name or ".", shared or "."))[0] for name in names]
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", stem) for stem in stems]
    count = Counter(key.lower() for key in plain)
    keys = []
    for key, origin in zip(plain, origins or names, strict=True):
        if count[key.lower()] > 1 or len(key) > _KEY_LENGTH or not key.strip("_"):
            digest = hashlib.blake2b(origin.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
            key = f"{key[: _KEY_LENGTH - 9]}-{digest}"
        keys.append(key)
    repeated = Counter(keys)
    seen: Counter[str] = Counter()
    for index, key in enumerate(keys):  # the same name twice: a table may list one file in several rows
        if repeated[key] > 1:
            seen[key] += 1
            keys[index] = f"{key}-{seen[key]}"
    return keys
