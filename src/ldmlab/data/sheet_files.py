"""What a run and a model record of their data: sources, licences, and the hash of the data sheet where there is one."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ldmlab.data.manifest import Manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.data.stores import Folder, Store
from ldmlab.errors import InputError
from ldmlab.files import read_json, write_atomically

SHEET = "data_sheet.json"
_NOT_HASHED = ("hash", "made")  # keys of a sheet: `made` has its date and command


def sheet_hash(sheet: Mapping[str, Any]) -> str:
    """SHA-256 of what a data sheet records, the same whenever and wherever it was made."""
    content = {name: value for name, value in sheet.items() if name not in _NOT_HASHED}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def find_sheet(folders: Iterable[Folder], manifest: Manifest) -> tuple[dict[str, Any] | None, Path | None]:
    """The sheet of these shards or of the images that they encode, beside them; else one of others."""
    hashes, stale = {manifest.hash, (manifest.latents or {}).get("source_hash")}, None
    local = [folder for folder in folders if not isinstance(folder, Store)]
    for path in dict.fromkeys(folder / SHEET for folder in local):
        sheet = read_json(path)
        try:
            if sheet and any(split["manifest"] in hashes for split in sheet["splits"].values()):
                if sheet["hash"] == sheet_hash(sheet):
                    return sheet, None
                raise ValueError("its hash is not that of its content")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path} is no data sheet ({error}); make it again with `ldmlab data-sheet`.") from None
        stale = path if sheet else stale
    return None, stale


def carry_sheet(images: Folder, latents: Path) -> None:
    """The sheet of images beside the latents made from them, since these are what a run reads."""
    if not isinstance(images, Store) and (images / SHEET).is_file():
        write_atomically(latents / SHEET, lambda path: shutil.copyfile(images / SHEET, path))


def data_record(data: ShardData, kind: str) -> tuple[dict[str, Any], list[str]]:
    """Of both splits as a run reads them, and remarks for the user; kind: images | latents."""
    record, notes = {}, []
    for split in ("train", "val"):
        folder, manifest = data.folder(split, kind), data.manifest(split, kind)
        sheet, stale = find_sheet([folder, data.folder(split, "images")], manifest)
        if stale and not sheet:
            notes.append(f"{stale} is the sheet of other shards than {folder}, so it is not recorded; make it again.")
        record[split] = {
            "images": manifest.total,
            "source": manifest.source,
            "licence": manifest.licence,
            "manifest": manifest.hash,
            "sheet": sheet and {name: sheet[name] for name in ("hash", "licences", "sources")},
        }
    return record, notes
