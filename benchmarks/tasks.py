"""What the loaders make up while training: scenes, masks and degradations, pictures of 256 x 256 a second.

python benchmarks/tasks.py [--workers 2] [--pictures 200]       goal: at least 200 a second on two cores
"""

import argparse
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np

from ldmlab.data.encode_pictures import Encoding
from ldmlab.data.scenes import SceneSettings, draw_scene, scene_part
from ldmlab.data.sources import Item
from ldmlab.tasks.inpainting import Inpainting
from ldmlab.tasks.super_resolution import SuperResolution

SIZE = 256
SCENES = SceneSettings("data/emoji-256/train", SIZE)
PICTURES = np.random.default_rng(0).integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8)
Make = Callable[[int], object]  # the picture's number


def given(task: Inpainting | SuperResolution) -> Make:
    """What a loader worker does for a task once the picture is decoded."""
    return lambda number: task.give({"image": PICTURES[number % len(PICTURES)]}, random.Random(number))


def makers() -> dict[str, Make]:
    """All that is timed, by name."""
    jpg = Encoding("jpg")
    found: dict[str, Make] = {
        "scene, drawn": lambda number: draw_scene(SCENES, f"train-{number}"),
        "scene, drawn and encoded (jpg)": lambda number: scene_part([Item(f"{number}", "", "")], SCENES, jpg),
    }
    for preset in ("lama_training", "thin_256", "medium_256", "thick_256"):
        found[f"inpainting, masks {preset}"] = given(Inpainting(SIZE, masks=preset))
    for degradation in ("bicubic", "bsr_light", "bsr"):
        found[f"super-resolution, {degradation}"] = given(SuperResolution(SIZE, degradation=degradation))
    return found


def seconds(name: str, pictures: int, first: int) -> tuple[float, float]:
    """Wall and processor time of one worker, after a warm-up."""
    make = makers()[name]
    for number in range(5):
        make(first + number)
    wall, spent = time.perf_counter(), time.process_time()
    for number in range(pictures):
        make(first + number)
    return time.perf_counter() - wall, time.process_time() - spent


def main() -> None:
    """Each maker in all workers at once; the slowest worker counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(2, len(os.sched_getaffinity(0))))
    parser.add_argument("--pictures", type=int, default=200, help="a worker (200)")
    args = parser.parse_args()
    print(f"{args.workers} processes, pictures of {SIZE} x {SIZE} a second (by processor time: were the cores free)")
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for name in makers():
            jobs = [pool.submit(seconds, name, args.pictures, 10_000 * n) for n in range(args.workers)]
            times = [job.result() for job in jobs]
            wall, spent = (args.workers * args.pictures / max(part) for part in zip(*times, strict=True))
            print(f"{name:<32} {wall:7.0f}  ({spent:.0f})", flush=True)


if __name__ == "__main__":
    main()
