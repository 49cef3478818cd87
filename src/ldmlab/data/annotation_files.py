"""Boxes and captions of images from the files that data sets publish: COCO's JSON and OpenImages' CSV.

Classes are numbered as in taming-transformers, whose loader the paper's layouts come from: by their ids as text.
"""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BufferedReader, TextIOWrapper
from pathlib import Path
from typing import Any

from ldmlab.annotations import Boxes
from ldmlab.data.image_sources import Source
from ldmlab.data.listings import read_text
from ldmlab.disks import open_regular
from ldmlab.errors import InputError

_FLAGS = {"IsGroupOf": "group_of", "IsOccluded": "occluded", "IsDepiction": "depiction", "IsInside": "inside"}
_SIDES = ("XMin", "YMin", "XMax", "YMax")
_NO_CLASS = "other"  # of COCO's stuff: everything without a name
_NEITHER = (
    "annotations={} is neither COCO's JSON nor a CSV with ImageID, LabelName, XMin, XMax, YMin and YMax; "
    "write boxes into a metadata.jsonl next to the images instead (data/README.md)."
)


@dataclass(frozen=True)
class Classes:
    """Names by class_id, and the numbers of all ids and names that count as one of them."""

    names: list[str]
    numbers: Mapping[str, int]


@dataclass
class Annotations:
    """What was found of the images, by file name without ending."""

    classes: list[str] | None = None  # names by class_id of the boxes
    boxes: dict[str, Boxes] = field(default_factory=lambda: defaultdict(list))
    captions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def read_annotations(files: Sequence[Path], classes: Path | None, names: set[str]) -> Annotations:
    """All files together; names: of images, without ending; classes: a file of their numbers and names."""
    table = read_classes(classes) if classes is not None else None
    found = Annotations()
    coco = {path: _coco_json(path) for path in files if path.suffix == ".json"}
    if table is None:  # all categories of all files but "other"; files of captions have none
        named = {str(c["id"]): str(c["name"]) for content in coco.values() for c in content.get("categories", ())}
        ids = sorted(key for key, name in named.items() if name != _NO_CLASS)
        table = Classes([named[key] for key in ids], {key: place for place, key in enumerate(ids)}) if ids else None
    for path, content in coco.items():
        try:
            _add_coco(found, path, content, table, names)
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise InputError(f"annotations={path} is not as COCO's files are ({error!r}); fix it.") from None
    for path in (path for path in files if path not in coco):
        if table is None:
            raise InputError(f"annotations={path} holds class ids without names; give --classes FILE with both.")
        _add_open_images(found, path, table, names)
    found.classes = table.names if found.boxes and table is not None else None
    return found


def read_classes(path: Path) -> Classes:
    """A class a line, numbered from 0: the ids that count as it, then its name, with tabs or commas between."""
    lines = read_text(path, f"classes={path}", "give another file").split("\n")
    rows = [line.split("\t" if "\t" in line else ",") for line in lines if line.strip() and line[0] != "#"]
    numbers: dict[str, int] = {}
    for number, row in enumerate(rows):
        for name in row:
            if numbers.setdefault(name.strip(), number) != number:
                raise InputError(f"classes={path} names {name.strip()} in two lines; leave one of them.")
    if not rows:
        raise InputError(f"classes={path} names no class; write one a line, an id and a name.")
    return Classes([row[-1].strip() for row in rows], numbers)


def _coco_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text(path, f"annotations={path}", "give another file"))
    except ValueError as error:
        raise InputError(f"annotations={path} cannot be read as JSON ({error}); give another file.") from None
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        raise InputError(f"annotations={path} has no `images` and `annotations` as COCO's files have; give another.")
    return content


def _add_coco(
    found: Annotations, path: Path, content: Mapping[str, Any], table: Classes | None, names: set[str]
) -> None:
    images = {one["id"]: (Path(one["file_name"]).stem, one["width"], one["height"]) for one in content["images"]}
    known: Mapping[str, int] = table.numbers if table else {}
    number = {one["id"]: known.get(str(one["id"]), known.get(one["name"])) for one in content.get("categories", ())}
    for one in content["annotations"]:
        if one.get("image_id") not in images:
            raise InputError(f"annotations={path} has one of image {one.get('image_id')}, which it does not list.")
        key, width, height = images[one["image_id"]]
        if key not in names:
            continue
        if "caption" in one:
            found.captions[key].append(" ".join(one["caption"].split()))
        elif (class_id := number.get(one.get("category_id"))) is not None:
            x, y, wide, high = one["bbox"]
            sides = (x / width, y / height, (x + wide) / width, (y + high) / height)
            _add_box(found.boxes[key], class_id, sides, ["group_of"] if one.get("iscrowd") else [])


def _add_open_images(found: Annotations, path: Path, table: Classes, names: set[str]) -> None:
    try:
        with TextIOWrapper(BufferedReader(open_regular(path)), encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file)
            at = {name: place for place, name in enumerate(next(rows, []))}
            if not {"ImageID", "LabelName", *_SIDES} <= at.keys():
                raise InputError(_NEITHER.format(path))
            for row in rows:
                key, class_id = row[at["ImageID"]], table.numbers.get(row[at["LabelName"]])
                if class_id is not None and key in names:
                    flags = [name for column, name in _FLAGS.items() if column in at and row[at[column]] == "1"]
                    _add_box(found.boxes[key], class_id, [float(row[at[side]]) for side in _SIDES], flags)
    except InputError:
        raise
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"annotations={path} cannot be read ({error}); give another file.") from None


def _add_box(boxes: Boxes, class_id: int, sides: Sequence[float], flags: Sequence[str]) -> None:
    """A box, cut at the image's edges; one without area is left out."""
    box = [round(min(max(side, 0.0), 1.0), 6) for side in sides]
    if box[0] < box[2] and box[1] < box[3]:
        boxes.append({"class_id": class_id, "box": box, **dict.fromkeys(flags, True)})


def image_names(source: Source) -> set[str]:
    """File names without extension, by which annotations refer to images."""
    return {Path(item.name).stem for item in source.items}


def annotated(source: Source, found: Annotations) -> Source:
    """With boxes, and with captions, the first of which is `caption`."""
    _check_files(source, "annotations")
    if not found.boxes and not found.captions:
        raise InputError("annotations: none of them is of an image in SOURCE; names must be equal up to the ending.")
    if found.boxes and source.classes is not None:
        raise InputError("annotations: folders are classes here and boxes have classes too; add --layout plain.")
    items = []
    for item in source.items:
        name, fields, fault = Path(item.name).stem, dict(item.fields), item.fault
        if found.boxes:
            fields["boxes"] = found.boxes.get(name, [])
        if found.captions:
            captions = found.captions.get(name, [])
            fields |= {"caption": captions[0] if captions else None, "captions": captions}
            fault = fault or (None if captions else "has no caption in the annotations")
        items.append(replace(item, fields=fields, fault=fault))
    return replace(source, items=items, classes=found.classes if found.boxes else source.classes)


def with_maps(source: Source, ending: str, folder: Path, option: str) -> Source:
    """With the PNG of each image's name in `folder`, perhaps in a folder of the same name there; ending: of MAPS."""
    _check_files(source, option)
    if not folder.is_dir():
        raise InputError(f"{option}={folder} is no folder; give the one that holds a PNG for each image.")
    present = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.png")}
    items = []
    for item in source.items:
        beside = Path(item.name).with_suffix(".png")
        file = present.get(beside.as_posix()) or present.get(beside.name)
        fault = item.fault or (None if file else f"has no {beside.name} in {folder}")
        items.append(replace(item, maps={**item.maps, **({ending: str(file)} if file else {})}, fault=fault))
    return replace(source, items=items)


def _check_files(source: Source, option: str) -> None:
    if any(item.span is not None for item in source.items):
        raise InputError(f"{option} is for images in folders, and SOURCE holds tars; put it into the tars instead.")
