"""Which images are packed, and where: opt-out lists, images held out for validation, images that occur again.

Held out are whole groups, evenly over the values of a field, by hash and not by order. A list leaves out images by URL,
by SHA-256 of the file, or by perceptual hash of 64 bits, by which alike images are found too.
"""

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.data.image_sources import Item
from ldmlab.data.manifest import file_sha256
from ldmlab.errors import InputError, shown
from ldmlab.files import read_text

NEAR_BITS = 3  # of 64, in which the hashes of alike images may differ
_SIDE, _LOW, _BITS = 32, 8, 64
_BANDS = NEAR_BITS + 1  # of 16 bits: hashes that differ in 3 bits are equal in one of 4 bands
_EXAMPLES = 5  # of each pair of splits
Hashes = NDArray[np.uint64]
_DCT = np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5))  # rows: frequencies of the DCT-II


def perceptual_hash(image: Image.Image) -> int:
    """pHash: which of the 8 x 8 lowest frequencies of 32 x 32 grey pixels lie above their median.

    Rounded, so that images of one colour, whose frequencies are 0, have one hash. As `imagehash.phash`; Zauner 2010.
    """
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    low = np.round(_DCT @ grey @ _DCT.T, 6)
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def near_pairs(hashes: Hashes) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Indices of all pairs of distinct hashes (N,) that differ in NEAR_BITS or less, some of them several times.

    Only hashes with an equal band are compared: about N^2 / 2^15 comparisons instead of N^2 / 2.
    """
    for band in range(_BANDS):
        keys = (hashes >> np.uint64(band * _BITS // _BANDS)) & np.uint64(2 ** (_BITS // _BANDS) - 1)
        order = np.argsort(keys, kind="stable")
        keys, ordered = keys[order], hashes[order]
        rows, offset = np.arange(len(keys) - 1), 1
        while len(rows := rows[rows + offset < len(keys)]):
            if not len(rows := rows[keys[rows] == keys[rows + offset]]):
                break
            close = rows[np.bitwise_count(ordered[rows] ^ ordered[rows + offset]) <= NEAR_BITS]
            yield order[close], order[close + offset]
            offset += 1


def repeats(
    hashes: Mapping[str, Hashes], near: bool
) -> tuple[dict[str, dict[str, int]], list[tuple[str, int, str, int]]]:
    """For splits s and t, the number of images of s that occur (near: or almost) in t, once more if t is s; examples.

    hashes: of each image, by split. Examples: split and position of an image and of one that it repeats.
    """
    known, place = np.unique(np.concatenate(list(hashes.values())), return_inverse=True)
    places = dict(zip(hashes, np.split(place, np.cumsum([len(part) for part in hashes.values()])[:-1]), strict=True))
    counts = {split: np.bincount(part, minlength=len(known)) for split, part in places.items()}
    twin = {split: np.full(len(known), -1) for split in hashes}  # another hash near to it, which the split has
    for pair in near_pairs(known) if near else ():
        for one, other in (pair, pair[::-1]):
            for split, count in counts.items():
                there = count[other] > 0
                twin[split][one[there]] = other[there]
    table: dict[str, dict[str, int]] = {split: {} for split in hashes}
    examples = []
    for s, own in places.items():
        for t, count in counts.items():
            equal = count[own] > (s == t)
            found = np.flatnonzero(equal | (twin[t][own] >= 0))
            table[s][t] = len(found)
            for image in found[:_EXAMPLES] if list(hashes).index(s) <= list(hashes).index(t) else ():
                same = np.flatnonzero(places[t] == (own[image] if equal[image] else twin[t][own[image]]))
                examples.append((s, int(image), t, int(same[same != image][0] if s == t else same[0])))
    return table, examples


@dataclass(frozen=True)
class SplitRule:
    """How images are held out; the default holds out none."""

    val: float = 0.0  # share of groups
    group: str | None = None  # images with one value of this field stay on one side; None: all rows of an image
    group_strip: str | None = None  # pattern cut out of that value first: what variants differ in
    stratify: str | None = None  # the share holds within each value of this field
    val_least: int = 1  # groups held out of each value, at least
    seed: int = 0
    name: str = "train"  # split that gets the rest

    def __post_init__(self) -> None:
        if not 0 <= self.val < 1:
            raise InputError(f"val={self.val} is no fraction; choose 0 <= val < 1.")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.name):
            raise InputError(f"split={self.name} is not a folder's name; use letters, digits, _ and -.")
        if self.group_strip is not None and self.group is None:
            raise InputError(f"group-strip={self.group_strip} needs --group FIELD to cut from; name the field.")
        if self.val and self.name == "val":
            raise InputError(f"split=val with val={self.val} leaves no training split; drop one of them.")
        try:
            re.compile(self.group_strip or "")
        except re.error as error:
            raise InputError(f"group-strip={self.group_strip} is not a regular expression ({error}); fix it.") from None

    @property
    def fields(self) -> set[str]:
        """Fields that items must have."""
        return {name for name in (self.group, self.stratify) if name is not None}


def split_items(items: list[Item], rule: SplitRule) -> dict[str, list[Item]]:
    """Split name => items in their order."""
    if not rule.val:
        return {rule.name: items}
    # key => key of the first row of the same image: a table may hold several rows an image
    first: dict[tuple[str, tuple[int, int] | None], str] = {}
    strata: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    home: dict[str, str] = {}  # group => stratum of its first image
    for index, item in enumerate(items):
        if rule.group is None:
            group = first.setdefault((os.path.normpath(item.path), item.span), item.key)
        else:
            group = str(_value(item, rule.group))
            group = re.sub(rule.group_strip, "", group) if rule.group_strip else group
        stratum = home.setdefault(group, str(_value(item, rule.stratify)) if rule.stratify else "")
        strata[stratum][group].append(index)
    held: set[int] = set()
    for groups in strata.values():
        ordered = sorted(groups, key=lambda group: blake2b(f"{rule.seed}/{group}".encode(), digest_size=8).hexdigest())
        count = min(max(round(rule.val * len(ordered)), rule.val_least), len(ordered) - 1)
        held.update(index for group in ordered[:count] for index in groups[group])
    val = [item for index, item in enumerate(items) if index in held]
    if not val:
        raise InputError(f"val={rule.val} holds out none of {len(items)} images; raise it or drop --group.")
    return {rule.name: [item for index, item in enumerate(items) if index not in held], "val": val}


def _value(item: Item, name: str) -> Any:
    if name not in item.fields and item.fault is None:
        found = ", ".join(item.fields) or "none"
        raise InputError(f"{item.name} has no field {name}, its fields are {found}; name one of them.")
    return item.fields.get(name)


def with_class_ids(items: list[Item], name: str) -> tuple[list[Item], list[str]]:
    """Items with `class` and `class_id` from the sorted distinct values of a field, and the names by class_id."""
    values = [_value(item, name) for item in items]
    classes = sorted({str(value) for value in values if value is not None})
    number = {value: index for index, value in enumerate(classes)}
    labelled = []
    for item, value in zip(items, values, strict=True):
        if value is None:
            labelled.append(replace(item, fault=item.fault or f"has no value in field {name}"))
        else:
            labelled.append(replace(item, fields={**item.fields, "class": str(value), "class_id": number[str(value)]}))
    return labelled, classes


WAYS = ("url", "sha256", "perceptual hash")


@dataclass(frozen=True)
class OptOut:
    """A list as an option; workers read it once each."""

    path: str
    sha256: str  # of the list
    distance: int = NEAR_BITS  # bits in which a perceptual hash of the list may differ

    @classmethod
    def of(cls, path: Path, distance: int = NEAR_BITS) -> "OptOut":
        """InputError for a line that is none of the three."""
        if not 0 <= distance <= 16:
            raise InputError(f"--exclude-distance {distance} must be in 0 .. 16 of 64 bits; 3 is usual.")
        try:
            listed = cls(str(path), file_sha256(path), distance)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise InputError(f"--exclude {path} cannot be read ({reason}); give a text file.") from None
        if not listed.entries():
            raise InputError(f"--exclude {path} lists nothing; write a URL or a hash a line, or leave the option out.")
        return listed

    def entries(self) -> int:
        known = _read(self.path)
        return len(known.urls) + len(known.sums) + len(known.hashes)

    def record(self, found: Mapping[str, int]) -> dict[str, Any]:
        """For the manifest; found: images left out by each of WAYS."""
        about = {"list": Path(self.path).name, "sha256": self.sha256, "distance": self.distance}
        return {**about, "entries": self.entries(), "left_out": {way: found.get(way, 0) for way in WAYS}}

    def match(self, content: bytes, image: Image.Image, fields: Mapping[str, Any]) -> str | None:
        """The way of WAYS by which an image is listed; content: of its file."""
        known = _read(self.path)
        if known.urls and any(value in known.urls for value in fields.values() if isinstance(value, str)):
            return WAYS[0]
        if known.sums and hashlib.sha256(content).hexdigest() in known.sums:
            return WAYS[1]
        if len(known.hashes):
            apart = np.bitwise_count(known.hashes ^ np.uint64(perceptual_hash(image.convert("RGB"))))
            if int(apart.min()) <= self.distance:
                return WAYS[2]
        return None


@dataclass(frozen=True)
class _Lines:
    urls: set[str] = field(default_factory=set)
    sums: set[str] = field(default_factory=set)
    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))


@cache
def _read(path: str) -> _Lines:
    urls, sums, hashes = set(), set(), set()
    try:
        lines = read_text(Path(path), "utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--exclude {path} is no text in UTF-8; write a URL or a hash a line.") from None
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if re.match(r"\w+://", text):
            urls.add(text)
        elif re.fullmatch(r"[0-9a-fA-F]{64}", text):
            sums.add(text.lower())
        elif re.fullmatch(r"[0-9a-fA-F]{16}", text):
            hashes.add(int(text, 16))
        elif text and not text.startswith("#"):
            raise InputError(
                f"--exclude {path}: line {number} ({shown(text)}) is no URL (https://...), no SHA-256 of a file (64 "
                "hexadecimal digits) and no perceptual hash (16 digits); correct it, or begin a comment with #."
            )
    return _Lines(urls, sums, np.array(sorted(hashes), np.uint64))
