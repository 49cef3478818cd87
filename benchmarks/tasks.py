"""What the loaders make up while training: scenes, masks and degradations, images of 256 x 256 a second.

python benchmarks/tasks.py [--images 200] [--only bsr]       goal: at least 200 a second on two cores

One process, then two at once. By processor time a busy machine counts as a free one; the wall's time stands beside it.
"""

import argparse
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from ldmlab.data.image_sources import Item
from ldmlab.data.pack_images import Encoding
from ldmlab.data.scene_shards import SceneSettings, draw_scene, scene_part
from ldmlab.tasks.inpainting import Inpainting
from ldmlab.tasks.super_resolution import SuperResolution

SIZE, WORKERS = 256, 2
SCENES = SceneSettings("data/emoji-256/train", SIZE)
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8)
Make = Callable[[int], object]  # the image's number


def given(task: Inpainting | SuperResolution) -> Make:
    """What a loader worker does for a task once the image is decoded."""
    return lambda number: task.give({"image": IMAGES[number % len(IMAGES)]}, random.Random(number))


def makers() -> dict[str, Make]:
    """All that is timed, by name."""
    jpg = Encoding("jpg")
    found: dict[str, Make] = {
        "scene, made": lambda number: draw_scene(SCENES, f"train-{number}"),
        "scene, made and encoded (jpg)": lambda number: scene_part([Item(f"{number}", "", "")], SCENES, jpg),
    }
    for preset in ("lama_training", "thin_256", "medium_256", "thick_256"):
        found[f"inpainting, masks {preset}"] = given(Inpainting(SIZE, masks=preset))
    for degradation in ("bicubic", "bsr_light", "bsr"):
        found[f"super-resolution, {degradation}"] = given(SuperResolution(SIZE, degradation=degradation))
    return found


def seconds(name: str, images: int, first: int) -> tuple[float, float]:
    """Wall and processor time of one worker, after a warm-up."""
    make = makers()[name]
    for number in range(5):
        make(first + number)
    wall, spent = time.perf_counter(), time.process_time()
    for number in range(images):
        make(first + number)
    return time.perf_counter() - wall, time.process_time() - spent


def rates(pool: ProcessPoolExecutor, name: str, images: int, workers: int) -> tuple[float, float]:
    """Images a second of all workers at once, by processor time and by the wall's; the slowest worker counts."""
    jobs = [pool.submit(seconds, name, images, 10_000 * n) for n in range(workers)]
    wall, spent = (workers * images / max(part) for part in zip(*(job.result() for job in jobs), strict=True))
    return spent, wall


def main() -> None:
    """Each maker on one core and on two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=200, help="a worker (200)")
    parser.add_argument("--only", default="", help="makers whose name holds this")
    args = parser.parse_args()
    print(f"images of {SIZE} x {SIZE} a second, by processor time (by the wall's)")
    print(f"{'':<32} {'one core':>16} {'two cores':>16}")
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        for name in (name for name in makers() if args.only in name):
            found = [rates(pool, name, args.images, workers) for workers in range(1, WORKERS + 1)]
            print(f"{name:<32} " + " ".join(f"{spent:8.0f} ({wall:5.0f})" for spent, wall in found), flush=True)


if __name__ == "__main__":
    main()
