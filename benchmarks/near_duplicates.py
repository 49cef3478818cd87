"""What the threshold of near duplicates finds: copies of images after common changes, and pairs of different images.

python benchmarks/near_duplicates.py SHARDS [IMAGES]
"""

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ldmlab.data.manifest import read_manifest
from ldmlab.data.shards import ShardReader
from ldmlab.data.splits import near_pairs, perceptual_hash
from ldmlab.data.tars import image_ending
from ldmlab.open_image import open_image

BITS = (0, 2, 4, 6, 8)  # distances are even: half of the 64 bits are set


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(io.BytesIO(file.getvalue()))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG 75": lambda image: jpeg(image, 75),
    "JPEG 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "cropped by 2 %": lambda image: image.crop((image.width // 50, image.height // 50, image.width, image.height)),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def main(folder: Path, count: int = 600) -> None:
    reader, images = ShardReader(folder, read_manifest(folder)), []
    for sample in range(min(count, reader.counts[0])):
        files = reader.read(0, sample)[1]
        images.append(open_image(files[image_ending(files)]).convert("RGB"))
    hashes = np.array([perceptual_hash(image) for image in images], np.uint64)
    found = {
        name: np.bitwise_count(hashes ^ np.array([perceptual_hash(change(image)) for image in images], np.uint64))
        for name, change in CHANGES.items()
    }
    found["pairs of different images"] = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(len(hashes), 1)]
    print(f"{len(images)} images; share within so many bits:", *BITS)
    for name, apart in found.items():
        print(f"{name:<26}", *(f"{(apart <= bits).mean():.5f}" for bits in BITS))
    million = np.unique(np.random.default_rng(0).integers(0, 2**64, 10**6, np.uint64))
    start = time.perf_counter()
    pairs = sum(len(one) for one, _ in near_pairs(million))
    print(f"a million random hashes: {time.perf_counter() - start:.1f} s, {pairs} pairs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
