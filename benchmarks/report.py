"""Time and size of pages over 40 runs, made of folders written here: `python benchmarks/report.py`."""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from ldmlab.app import cli

IMAGE_PX = 256
IMAGES = 16  # of each kind a run keeps
LIMITS = (30.0, 5.0)  # seconds and MB that a page may take


def write_image(path: Path, seed: int) -> None:
    """Smooth colours with a little grain, so that it packs like a photograph and not like a drawing."""
    numbers = np.random.default_rng(seed)
    coarse = Image.fromarray(numbers.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    image = coarse.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BICUBIC).filter(ImageFilter.SMOOTH)
    grain = numbers.normal(0, 4, (IMAGE_PX, IMAGE_PX, 1))
    Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(path)


def write_images(folder: Path, kind: str, seed: int) -> list[dict[str, Any]]:
    """Files of one kind and what metrics.json says of them."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{kind}_{number:05d}.png" for number in range(IMAGES)]
    for number, name in enumerate(names):
        write_image(folder / name, seed * IMAGES + number)
    return [{"file": f"images/{name}", "caption": f"image {name}"} for name in names]


def scores(seed: int) -> dict[str, Any]:
    """Of plausible size."""
    draw = random.Random(seed)
    values = {
        "fid": draw.uniform(3, 60),
        "kid": draw.uniform(0, 2),
        "precision": draw.random(),
        "recall": draw.random(),
    }
    return {name: {"value": value, "spread": None, "marks": []} for name, value in values.items()}


def evaluation(folder: Path, seed: int) -> Path:
    """What evaluate.py writes."""
    samples = write_images(folder / "images", "sample", seed)
    real = write_images(folder / "images", "real", seed + 10_000)
    record = {
        "format_version": 1,
        "scores": scores(seed),
        "images": {"samples": samples, "real": real},
        "protocol": {"name": "benchmark", "reference": "val", "samples": 1000, "metrics": {}},
        "sampling": {
            **{"steps": 50, "guidance_scale": 1.0, "eta": 0.0, "seed": 0, "size": "256x256", "sampler": "ddim"},
            **{
                "spacing": "official",
                "images": 1000,
                "conditions": "none",
                "images_per_second": 10.0,
                "processes": 1,
                "hardware": "CPU",
            },
        },
        "model": {
            "path": f"runs/run-{seed:02d}",
            "weights": "averaged",
            "step": 1000,
            "fingerprint": f"{seed:016x}",
            "guiders": {},
        },
        "reference": {
            **{"folder": "data/val", "split": "val", "images": 1000, "manifest_hash": "0" * 64, "image_size": 256},
            **{"transform": {"size": 256, "rule": "centre"}, "task": None, "source": "benchmark", "kept": False},
        },
        "features": {"name": "benchmark", "weights_hash": "0" * 16, "width": 128},
        "provenance": {},
        "seconds": 1.0,
    }
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def job(folder: Path, seed: int) -> Path:
    """What a job of the downsampling comparison writes: five points of the training, five numbers of sampler steps."""
    factor, steps = 2 ** (seed % 6), 10_000
    first_stage = folder.parent / f"first_stage-{factor}"
    if not first_stage.exists():
        write_images(first_stage / "evaluation" / "tradeoff-0" / "images", "reconstruction", 20_000 + factor)
    write_images(folder / "evaluation" / f"step_{steps:08d}-100-0" / "images", "sample", seed)

    def point(step: int, sampler_steps: int) -> dict[str, Any]:
        scored = {"step": step, "sampler_steps": sampler_steps, "seconds": 0.1 * step, "flops": step * 10**12 // factor}
        return scored | {"scores": scores(seed + step), "scored_by": {"features": {"name": "benchmark"}}}

    training = [point(step, 100) for step in range(2_000, steps + 1, 2_000)]
    record = {
        **{"format_version": 1, "downsampling": factor, "latent": [4, 256 // factor, 256 // factor], "seed": seed // 6},
        **{"max_steps": steps, "budget": "steps", "images_per_step": 64, "processes": 1, "parameters": 26_000_000},
        **{"forward": 10**10 // factor, "training": 3 * 10**10 // factor, "decoder": 10**10},
        **{"first_stage": str(first_stage), "protocol": {"name": "benchmark", "guidance_scale": 1.0}},
        "points": training + [point(steps, sampler_steps) for sampler_steps in (10, 20, 50, 200)],
        "reconstruction": scores(factor) | {"psnr": {"value": 25.0}},
        "seconds_per_image": {str(sampler_steps): 0.01 * sampler_steps for sampler_steps in (10, 20, 50, 100, 200)},
    }
    (folder / "tradeoff.json").write_text(json.dumps(record))
    return folder


def measured(title: str, write: Callable[[Path, int], Path], count: int) -> bool:
    """One page over `count` folders; whether it keeps the limits."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for number in range(count):
            (Path(scratch) / f"run-{number:02d}").mkdir()
            folders.append(write(Path(scratch) / f"run-{number:02d}", number))
        out = Path(scratch) / "page"
        began = time.perf_counter()
        failed = cli.dispatch(["report", *map(str, folders), "--out", str(out)])
        seconds = time.perf_counter() - began
        megabytes = (out / "report.html").stat().st_size / 1e6
    print(f"{title}: {count} runs in {seconds:.1f} s, {megabytes:.2f} MB (limits: {LIMITS[0]:g} s, {LIMITS[1]:g} MB)")
    return not failed and seconds <= LIMITS[0] and megabytes <= LIMITS[1]


def main() -> int:
    """1 where a page takes longer or is larger than it may be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40, help="folders in a page (40)")
    count = parser.parse_args().runs
    kept = [measured("evaluations side by side", evaluation, count), measured("downsampling comparison", job, count)]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
