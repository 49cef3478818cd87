"""How a process starts on very large data: python benchmarks/manifest.py [--samples 100000000] [--shards 10000].

Makes the manifest of as many latents, of which all shards are links to one tar, and starts on it in processes of their
own: seconds for the manifest and its hash, the data set (every shard's size, every sample's place, 100 samples read),
the first batch and the place of one in a far epoch; peak memory as the system counts it, mapped pages included. Then
how many shards each of 64 processes reads.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from ldmlab.data.manifest import Manifest, write_manifest
from ldmlab.data.order import EpochOrder, training_batches
from ldmlab.data.shard_data import ShardData
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.tars import END_MARKER, scan_tar, tar_bytes

GIB = 2**30
WORLD, MICRO_BATCH = 64, 60
MOST_LINKS = 30_000  # to one file; ext4 takes 65,000


def make(folder: Path, samples: int, shards: int) -> None:
    """One tar with samples / shards samples, linked `shards` times, and the manifest of all of them."""
    file = io.BytesIO()
    np.save(file, np.zeros((1, 8, 1, 1), np.float16))
    each = samples // shards
    first = folder / "shard-0.tar"
    with open(first, "wb") as tar:
        for number in range(each):
            tar.write(tar_bytes(f"{number:06}.json", json.dumps({"caption": "a", "class_id": number % 1000}).encode()))
            tar.write(tar_bytes(f"{number:06}.npy", file.getvalue()))
        tar.write(END_MARKER)
    info = scan_tar(first)[0]
    infos = [ShardInfo(f"shard-{i}.tar", each, info.bytes, info.sha256, info.places) for i in range(shards)]
    for i in range(1, shards):
        os.link(first, folder / infos[i].name)
    latents = {
        **{"fingerprint": "f", "latent_channels": 4, "downsampling": 8, "image_size": 8, "mirrored": False},
        **{"has_logvar": True, "carries_images": False, "states": None},
        "statistics": {"images": samples, "mean": [0.0], "std": [1.0], "overall_mean": 0.0, "overall_std": 1.0},
    }
    write_manifest(
        folder, Manifest("latents", "train", infos, ["caption", "class_id"], 8, {}, "", "", {}, latents=latents)
    )


def start(folder: str) -> None:
    """What every process of a run does before its first step; prints a line of figures."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    marks = [time.perf_counter()]
    data = ShardData(folder, folder, image_size=8, latents=str(Path(folder).parent), workers=0)
    manifest = data.manifest("train")
    marks.append(time.perf_counter())
    assert manifest.hash
    marks.append(time.perf_counter())
    dataset = data.train_dataset()
    marks.append(time.perf_counter())
    next(islice(data.train_loader(MICRO_BATCH, 1, WORLD, 17), 1))
    marks.append(time.perf_counter())
    dataset.order.locate(7 * manifest.total + 12_345)
    marks.append(time.perf_counter())
    manifest_s, hash_s, dataset_s, batch_s, locate_s = np.diff(marks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"manifest {manifest_s:.2f} s, hash {hash_s:.2f} s, data set {dataset_s:.2f} s, a data set anew and its first "
        f"batch of {MICRO_BATCH} {batch_s:.2f} s, a far place {locate_s:.2f} s; together {marks[-1] - marks[0]:.2f} s; "
        f"peak {peak / 2**20:.2f} GiB, of which imports {before / 2**20:.2f}"
    )


def spread(shards: int, each: int) -> None:
    """How many shards a process reads in a window, and how many processes read a shard, of WORLD processes."""
    for mix in (8, WORLD):
        for by_shard in (False, True):
            order = EpochOrder([each] * shards, seed=0, mix=mix)
            chosen = order.by_shard if by_shard else None
            steps = range(each * mix // (MICRO_BATCH * WORLD))
            streams = [training_batches(MICRO_BATCH, 1, WORLD, rank, 0, chosen) for rank in range(WORLD)]
            began = time.perf_counter()
            read = [[{order.locate(p).shard for p in next(stream)} for _ in steps] for stream in streams]
            opened = [len(set().union(*of_rank)) for of_rank in read]
            name = "by shard" if by_shard else "by position"
            print(
                f"data.mix={mix}, {name}: a process reads {np.mean(opened):.1f} shards in a window of "
                f"{len(steps)} steps, {np.mean([len(one) for of_rank in read for one in of_rank]):.1f} in a step; "
                f"a shard has {sum(opened) / mix:.1f} processes; {time.perf_counter() - began:.1f} s"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000_000)
    parser.add_argument("--shards", type=int, default=10_000, help=f"at most {MOST_LINKS}")
    parser.add_argument("--start", help=argparse.SUPPRESS)  # folder of the made manifest; in a process of its own
    chosen = parser.parse_args()
    if chosen.start:
        start(chosen.start)
        return
    if not 1 <= chosen.shards <= min(MOST_LINKS, chosen.samples):
        parser.error(f"--shards={chosen.shards} is not 1 .. {min(MOST_LINKS, chosen.samples)}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "train"
        folder.mkdir()
        make(folder, chosen.samples, chosen.shards)
        places, listed = ((folder / name).stat().st_size for name in ("manifest.places", "manifest.json"))
        print(f"{chosen.samples:,} samples in {chosen.shards:,} shards: places {places / GIB:.2f} GiB, ", end="")
        print(f"manifest.json {listed / 2**20:.1f} MiB", flush=True)
        for _ in range(2):  # the second one with what the first left in the page cache
            subprocess.run([sys.executable, __file__, "--start", str(folder)], check=True)
    spread(chosen.shards, chosen.samples // chosen.shards)


if __name__ == "__main__":
    main()
