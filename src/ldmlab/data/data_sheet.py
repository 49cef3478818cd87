"""A data sheet: what lies in image shards, measured on every image by several processes (Gebru et al. 2021).

Runs and models record its hash, sources and licences.
"""

import hashlib
import json
import re
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ldmlab.data.decode import CAPTION, sample_fields
from ldmlab.data.manifest import Manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.data.shards import Folder, ShardReader, Store
from ldmlab.data.splits import NEAR_BITS, perceptual_hash, repeats
from ldmlab.data.tars import image_ending
from ldmlab.data.workers import in_order
from ldmlab.errors import InputError
from ldmlab.files import read_json, write_atomically
from ldmlab.open_image import open_image
from ldmlab.provenance import provenance

_PART = 64  # images a worker takes at once
_WORDS, _VALUES, _LONGEST = 20, 50, 120  # shown: frequent words, values of a field, characters of one
LICENCES, SOURCES = ("licence", "license"), ("source",)  # fields of KEY.json


_64, _32 = partial(array, "Q"), partial(array, "I")  # columns of numbers: millions of images take little memory


@dataclass
class Seen:
    """What was found in some images; parts are added up in their order."""

    numbers: "array[int]" = field(default_factory=_64)  # of readable images in their split
    pixels: "array[int]" = field(default_factory=_64)  # 64 bits of BLAKE2 of size and RGB pixels
    looks: "array[int]" = field(default_factory=_64)  # perceptual hashes
    sides: "array[int]" = field(default_factory=_32)  # the shorter one, px
    lengths: "array[int]" = field(default_factory=_32)  # words of each caption
    captions: "array[int]" = field(default_factory=_64)  # 64 bits of BLAKE2
    without: int = 0  # images without a caption
    unreadable: int = 0
    words: Counter[str] = field(default_factory=Counter)
    values: dict[str, Counter[str]] = field(default_factory=dict)  # of the counted fields

    def add(self, other: "Seen") -> None:
        for name, value in vars(other).items():
            if isinstance(value, array):
                getattr(self, name).extend(value)
            elif isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)
        self.words.update(other.words)
        for name, counts in other.values.items():
            self.values.setdefault(name, Counter()).update(counts)


def data_sheet(
    splits: Mapping[str, tuple[Path, Manifest]],
    *,
    licences: Sequence[str] = LICENCES,  # fields with an image's licence, the first one that it has counts
    sources: Sequence[str] = SOURCES,
    counted: Sequence[str] = (),  # more fields whose values are counted
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,  # images done, of how many
) -> dict[str, Any]:
    """The sheet in plain types, and of equal shards with an equal `hash`."""
    seen, total, done = {}, sum(manifest.total for _, manifest in splits.values()), 0
    for split, (folder, manifest) in splits.items():
        if manifest.kind != "images":
            raise InputError(f"SHARDS={folder} holds {manifest.kind}; give the images that they were encoded from.")
        look = partial(_look, ShardReader(folder, manifest), (licences, sources, *((name,) for name in counted)))
        parts = [(shard, i) for shard, one in enumerate(manifest.shards) for i in range(0, one.samples, _PART)]
        seen[split] = Seen()
        for part in in_order(look, parts, min(workers, len(parts))):
            seen[split].add(part)
            if progress:
                progress(done + len(seen[split].numbers) + seen[split].unreadable, total)
        done += manifest.total
    sheet: dict[str, Any] = {
        "format_version": 1,
        "splits": {split: _split(*splits[split][1:], seen[split]) for split in splits},
        "licences": _over(splits, seen, licences, "licence"),
        "sources": _over(splits, seen, sources, "source"),
        "counts": {name: _top(_values(seen, (name,)), _VALUES) for name in counted},
        "duplicates": _duplicates(splits, seen),
    }
    return {"hash": sheet_hash(sheet), **sheet, "made": provenance()}


def _look(reader: ShardReader, fields: Sequence[Sequence[str]], part: tuple[int, int]) -> Seen:
    """Of up to _PART samples of a shard, from the one of that number on."""
    (shard, start), seen = part, Seen()
    for sample in range(start, min(start + _PART, reader.counts[shard])):
        try:
            _, files = reader.read(shard, sample)
            known = sample_fields(files)
            image = open_image(files[image_ending(files) or "image"]).convert("RGB")
        except FileNotFoundError:
            raise InputError(f"SHARDS lack {reader.names[shard]}, which the manifest lists; copy it again.") from None
        except Exception:  # whatever a decoder raises on broken bytes
            seen.unreadable += 1
            continue
        seen.numbers.append(reader.index(shard, sample))
        seen.pixels.append(_hash(f"{image.size}".encode() + image.tobytes()))
        seen.looks.append(perceptual_hash(image))
        seen.sides.append(min(image.size))
        texts = known.get("captions") or known.get(CAPTION) or []
        for text in [texts] if isinstance(texts, str) else texts:
            words = re.findall(r"\w+", str(text).lower())
            seen.words.update(words)
            seen.lengths.append(len(words))
            seen.captions.append(_hash(str(text).encode()))
        seen.without += not texts
        for names in fields:
            value = next((known[name] for name in names if known.get(name) is not None), None)
            if value is not None:
                seen.values.setdefault("/".join(names), Counter())[str(value)[:_LONGEST]] += 1
    return seen


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def _split(manifest: Manifest, seen: Seen) -> dict[str, Any]:
    return {
        "manifest": manifest.hash,
        "images": len(seen.numbers),
        "unreadable": seen.unreadable,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "side": _range(seen.sides),
        "fields": manifest.fields,
        "captions": {
            "count": len(seen.captions),
            "distinct": len(np.unique(seen.captions)),
            "images_without": seen.without,
            "words": _range(seen.lengths),
            "frequent_words": _top(seen.words, _WORDS),
        },
        "opt_out": manifest.extra.get("opt_out"),
    }


def _range(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"least": min(values), "median": float(np.median(values)), "most": max(values)}


def _top(counts: Counter[str], most: int) -> dict[str, int]:
    """The most frequent first, equal ones by name; the others together."""
    ordered = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    rest = sum(count for _, count in ordered[most:])
    return dict(ordered[:most]) | ({"(others)": rest} if rest else {})


def _values(seen: Mapping[str, Seen], names: Sequence[str]) -> Counter[str]:
    return sum((part.values.get("/".join(names), Counter()) for part in seen.values()), Counter())


def _over(
    splits: Mapping[str, tuple[Path, Manifest]], seen: Mapping[str, Seen], names: Sequence[str], own: str
) -> dict[str, int]:
    """Images by the value of a field, those without one by what their manifest has."""
    counts = _values(seen, names)
    for split, (_, manifest) in splits.items():
        without = len(seen[split].numbers) - sum(seen[split].values.get("/".join(names), Counter()).values())
        counts[getattr(manifest, own) or "not recorded"] += without
    return _top(+counts, _VALUES)


def _duplicates(splits: Mapping[str, tuple[Path, Manifest]], seen: Mapping[str, Seen]) -> dict[str, Any]:
    """Images of each split that occur again in each, and keys of some."""
    readers = {split: ShardReader(*given) for split, given in splits.items()}

    def key(split: str, place: int) -> str:
        reader, number = readers[split], seen[split].numbers[place]
        shard = int(np.searchsorted(reader.ends, number, side="right"))
        return reader.read(shard, number - int(reader.ends[shard]) + reader.counts[shard])[0]

    found: dict[str, Any] = {"near_bits": NEAR_BITS}
    for name, near in (("pixels", False), ("looks", True)):
        hashes = {split: np.array(getattr(part, name), np.uint64) for split, part in seen.items()}
        table, examples = repeats(hashes, near)
        kind = "near" if near else "exact"
        found[kind] = table
        found[f"{kind}_examples"] = [[s, key(s, one), t, key(t, other)] for s, one, t, other in examples]
    return found


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
