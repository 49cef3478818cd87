"""Images that occur again: equal pixels by a hash, and alike ones by a perceptual hash of 64 bits."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

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
