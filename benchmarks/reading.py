"""How fast shards are read: python benchmarks/reading.py [--images FOLDER] [--size 64] [--seconds 4].

Prints images per second for image shards (decoded anew, and kept decoded) and for latent shards made from them with
a toy encoder, with 0, 1 and 2 workers; "per core" counts processor time, whatever else the machine does; memory is the
proportional share of the main process and its workers. The start of large data: manifest.py.
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import avg_pool2d
from torch.utils.data import DataLoader

from ldmlab.data.encode_shards import LatentSettings, encode
from ldmlab.data.manifest import read_manifest
from ldmlab.data.shard_data import ShardData

BATCH = 64


def memory_mib(loader_iterator: Any) -> float:
    """Proportional set size of this process and its workers."""
    pids = [os.getpid(), *(worker.pid for worker in getattr(loader_iterator, "_workers", []))]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def measure(loader: DataLoader[Any], skip: int, seconds: float) -> tuple[float, float, float]:
    """Images per second, images per second of this process on a core, and MiB; after `skip` batches."""
    batches = iter(loader)
    for _ in islice(batches, skip):
        pass
    start, core, images = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - start < seconds:
        images += len(next(batches)["key"])
    took, core = time.perf_counter() - start, time.process_time() - core
    return images / took, images / core, memory_mib(batches)


def toy_moments(images: torch.Tensor) -> torch.Tensor:
    """Four channels and their log-variances at f = 4."""
    small = avg_pool2d(images.float() / 127.5 - 1, 4)
    mean = torch.cat([small, small[:, :1]], dim=1)
    return torch.cat([mean, mean], dim=1)


def timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", default="data/emoji-256/train", help="folder of image shards")
    parser.add_argument("--size", type=int, default=64, help="px the images are read at")
    parser.add_argument("--seconds", type=float, default=4.0, help="measured per row")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        settings = LatentSettings("toy", latent_channels=4, downsampling=4, image_size=chosen.size)
        took = timed(lambda: encode(chosen.images, Path(scratch) / "train", toy_moments, settings))
        total = read_manifest(chosen.images).total
        print(f"{total} images of {chosen.images} at {chosen.size} px, batches of {BATCH}")
        print(f"encode with a toy encoder, both views: {total / took:.0f} images/s")
        print(f"{'reads':28}{'workers':>8}{'images/s':>12}{'per core':>10}{'MiB':>8}")
        images = ShardData(chosen.images, chosen.images, chosen.size, flip=True)
        rows = {
            "image shards": images,
            "image shards, kept decoded": replace(images, cache=True),
            "latent shards": replace(images, latents=scratch),
        }
        for name, data in rows.items():
            for workers in (0, 1, 2):
                skip = -(-total // BATCH) if data.cache else 4  # the cache is filled in the first epoch
                rate, per_core, mib = measure(replace(data, workers=workers).train_loader(BATCH), skip, chosen.seconds)
                print(f"{name:28}{workers:8}{rate:12.0f}{'' if workers else f'{per_core:.0f}':>10}{mib:8.0f}")


if __name__ == "__main__":
    main()
