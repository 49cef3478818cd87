"""Images held out for validation, and images that occur again.

Held out are whole groups, evenly over the values of a field, by hash and not by order. Alike images are found by
perceptual hashes of 64 bits.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldmlab.data.image_sources import Item
from ldmlab.errors import InputError

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
