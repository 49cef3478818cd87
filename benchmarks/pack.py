"""`ldmlab pack` on one core and on all: images per second, and how much of cores x one-core rate is kept.

python benchmarks/pack.py [--images 3000] [--workers N]       goal: at least 0.90
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from ldmlab.data.image_sources import Source, list_source
from ldmlab.data.pack_shards import PackOptions, pack
from ldmlab.data.transforms import Transform


def make_images(folder: Path, count: int) -> None:
    """JPEG files of 640 x 480 with smooth and rough parts, as photographs have."""
    random = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
        rough = random.normal(0, 8, (480, 640, 3))
        pixels = np.clip(np.asarray(coarse) + rough, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06d}.jpg", quality=90)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Inside, this process and its workers run on as many cores."""
    all_cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(all_cores)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def rates(source: Source, out: Path, workers: int) -> tuple[float, float]:
    """Images per second, from the call to the last manifest, and per second of processor time of all processes."""
    start, spent = time.perf_counter(), processor_seconds()
    with cores(workers):
        pack(source, out, PackOptions(Transform(256)), workers=workers)
    count = len(source.items)
    return count / (time.perf_counter() - start), count / (processor_seconds() - spent)


def processor_seconds() -> float:
    """Of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Rounds of one core and all cores in turn; the best of each counts, since other jobs only slow down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        make_images(images, args.images)
        source = list_source(images)
        one, many = (0.0, 0.0), (0.0, 0.0)
        for number in range(args.rounds):
            one = max(one, rates(source, Path(folder) / f"one-{number}", 1))
            many = max(many, rates(source, Path(folder) / f"many-{number}", args.workers))
    print(f"one core {one[0]:.1f} images/s, {args.workers} cores {many[0]:.1f} images/s")
    print(f"kept {many[0] / (args.workers * one[0]):.2f} of {args.workers} x the one-core rate (goal 0.90)")
    print(f"an image's processor time on one core is {many[1] / one[1]:.2f} of that on {args.workers}")


if __name__ == "__main__":
    main()
