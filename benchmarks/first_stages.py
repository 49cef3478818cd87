"""Does generation follow rFID or the spectrum? Small KL first stages without and with each regulariser or alignment.

    python benchmarks/first_stages.py --train data/emoji-256/train --val data/emoji-256/val --out runs/first-stages

First stages have equal steps, denoisers equal FLOPs; a seed is the first stage's, the denoiser's is 0. What exists in
--out is kept, so more seeds or arms take only their own time. Prints means and deviations over the seeds, then
Spearman's rank correlations of the distance of generated images with every other number over all first stages, with
95 % intervals by the bootstrap over first stages; OUT/report.html has the sheets.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from scipy.stats import spearmanr

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.wiring import train
from ldmlab.report.first_stage_page import measures, write_sheets

ARMS = {
    "plain": [],
    "equivariance": ["loss.regularisers.equivariance=0.5", "loss.regularisers.low_resolution=0.25"],
    "noise": ["loss.regularisers.noise=0.5"],
    "masked": ["loss.regularisers.masked=0.5"],
    "aligned": ["alignment=va_vae", "encoder=clip", "encoder.clip.from_run={clip}"],
}
SHOWN = ("reconstruction psnr", "high_band", "slope", "noise_loss", "half_way", "half_size_decoder", "turned_decoder")


def first_stage(args: argparse.Namespace, arm: str, seed: int) -> Path:
    """The run of an arm and a seed, trained unless it is finished."""
    folder = args.out / "first_stages" / f"{arm}-{seed}"
    if not (folder / "finished.json").exists():
        options = [
            *("experiment=mine/first_stage", f"data.train={args.train}", f"data.val={args.val}", f"seed={seed}"),
            *(f"data.image_size={args.size}", "data.cache=true", "data.workers=0", "logger=csv", "callbacks=quiet"),
            *(f"first_stage.channels={args.channels}", "first_stage.norm_groups=8", f"run.dir={folder}"),
            *(f"trainer.max_steps={args.steps}", "trainer.micro_batch=16", f"trainer.validate_every={args.steps}"),
        ]
        train(plain(compose("train", [*options, *(word.format(clip=args.clip) for word in ARMS[arm])])))
    return folder


def sheet(args: argparse.Namespace, run: Path, seed: int) -> dict:
    """sheet.json of a run, measured unless it is there."""
    out = args.out / f"seed-{seed}"
    if not (known := sorted(out.glob(f"{run.name}-*/sheet.json"))):
        words = ["first-stage", str(run), "--out", str(out), "--seeds", "1", "--samples", str(args.samples)]
        words += ["--features", "clip_run,pixels", f"features.clip_run.run={args.clip}", "features.pixels.side=8"]
        cli.dispatch([*words, "--generation-steps", str(args.generation_steps)])
        known = sorted(out.glob(f"{run.name}-*/sheet.json"))
    return json.loads(known[0].read_text())


def interval(x: Sequence[float], y: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """Spearman's correlation, and the 95 % percentile interval of the bootstrap over points."""
    points, random = np.array([x, y]), np.random.default_rng(0)
    found = [spearmanr(*points[:, random.integers(0, len(x), len(x))])[0] for _ in range(draws)]
    low, high = np.nanquantile(found, [0.025, 0.975])
    return float(spearmanr(x, y)[0]), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", required=True)
    add("--val", required=True)
    add("--out", type=Path, required=True)
    add("--clip", default="emoji/clip", help="run or folder of the CLIP whose features are compared")
    add("--size", type=int, default=32)
    add("--channels", type=int, default=16)
    add("--steps", type=int, default=300, help="of a first stage, of 16 images")
    add("--generation-steps", type=int, default=100)
    add("--samples", type=int, default=200)
    add("--seeds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    sheets = []
    for seed in range(args.seeds):
        for arm in ARMS:
            sheets.append(sheet(args, first_stage(args, arm, seed), seed))
            found[arm].append({one.name: one.value for one in measures(sheets[-1]) if one.value is not None})
            write_sheets(args.out, sheets)
            report(found)


def report(found: dict[str, list[dict[str, float]]]) -> None:
    """The table and the correlations of what is finished."""
    made = {arm: rows for arm, rows in found.items() if rows}
    distances = [name for name in next(iter(made.values()))[0] if " fid, " in name]
    columns = [*SHOWN, *distances]
    print(f"| arm | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    for arm, rows in made.items():
        cells = [[row[name] for row in rows] for name in columns]
        texts = [f"{mean(c):.4g} ± {stdev(c):.2g}" if len(c) > 1 else f"{c[0]:.4g}" for c in cells]
        print(f"| {arm} | {' | '.join(texts)} |")
    rows = [row for rows in made.values() for row in rows]
    for target in (name for name in distances if name.startswith("generation")) if len(rows) > 4 else ():
        print(f"\nrank correlation with {target}, {len(rows)} first stages")
        for name in (one for one in columns if not one.startswith("generation")):
            value, low, high = interval([row[name] for row in rows], [row[target] for row in rows])
            print(f"| {name} | {value:+.2f} ({low:+.2f} to {high:+.2f}) |")


if __name__ == "__main__":
    main()
