"""Images of a SOURCE together with what other files and folders say of them."""

from dataclasses import replace
from pathlib import Path

from ldmlab.data.annotation_files import Annotations
from ldmlab.data.sources import Item, Source
from ldmlab.errors import InputError


def image_names(source: Source) -> set[str]:
    """File names without ending, by which annotations know images."""
    return {Path(item.name).stem for item in source.items}


def annotated(source: Source, found: Annotations) -> Source:
    """With boxes, and with captions, the first of which is `caption`."""
    _check_files(source, "annotations")
    if not found.boxes and not found.captions:
        raise InputError("annotations: none of them is of an image in SOURCE; names must be equal up to the ending.")
    if found.boxes and source.classes is not None:
        raise InputError("annotations: folders are classes here and boxes have classes too; add --layout plain.")
    items = [_annotated(item, found) for item in source.items]
    return replace(source, items=items, classes=found.classes if found.boxes else source.classes)


def _annotated(item: Item, found: Annotations) -> Item:
    name = Path(item.name).stem
    fields, fault = dict(item.fields), item.fault
    if found.boxes:
        fields["boxes"] = found.boxes.get(name, [])
    if found.captions:
        captions = found.captions.get(name, [])
        fields |= {"caption": captions[0] if captions else None, "captions": captions}
        fault = fault or (None if captions else "has no caption in the annotations")
    return replace(item, fields=fields, fault=fault)


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
