"""Deep compression, f = 32: first stages with the shortcuts between space and channels and without, at equal steps.

    python benchmarks/deep_compression.py [--seeds 3] [--steps 500] [--size 64] [--batch 4] [--rates 3e-3]
        [--data data/emoji-256] [--images 2000] [--held-out 256] [--width 0.5]

conf/first_stage/dc_f32_small.yaml at half its width, one thread, L1, AdamW, cosine rate. Of several rates each arm has
the best, found on a seed of its own (1000). PSNR of held-out images by an average of weights over a hundred steps.
"""

import argparse
import json
import time
from statistics import mean, stdev
from typing import Any

import torch
import yaml
from torch import Tensor

from ldmlab.app.conf_files import conf_dir
from ldmlab.averaging import AveragedWeights
from ldmlab.data.shard_data import ShardData
from ldmlab.instantiate import instantiate
from ldmlab.metrics.reconstruction import ReconstructionMeasures
from ldmlab.nn.pixels import to_bytes, to_float
from ldmlab.training.optim import AdamW, Cosine

ARMS = {"with shortcuts": True, "without": False}
SEARCH_SEED = 1000


def images_of(data: ShardData, split: str, count: int) -> Tensor:
    """uint8 (N, 3, H, W)."""
    return torch.cat([batch["image"] for batch in data.eval_loader(split, 64, limit=count)])


def trained(node: dict[str, Any], seed: int, rate: float, train: Tensor, held_out: Tensor, args: Any) -> float:
    """PSNR of the held-out images, dB."""
    torch.manual_seed(seed)
    stage = instantiate(node, where="first_stage", trust=True)
    optimizer = AdamW(rate, betas=(0.9, 0.99))(list(stage.parameters()))
    curve, average = Cosine(args.steps, warmup_steps=20, final=0.02), AveragedWeights(stage, 0.99)
    for step in range(args.steps):
        images = to_float(train[torch.randint(len(train), (args.batch,))])
        loss = (stage.reconstruct(images, torch.empty(0)).images - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate * curve(step)
        optimizer.step()
        average.update()
    measures = ReconstructionMeasures()
    with torch.no_grad(), average.applied():
        for images in held_out.split(64):
            measures.update(images, to_bytes(stage.eval().reconstruct(to_float(images), torch.empty(0)).images))
    return float(measures.compute()["psnr"])


def main() -> None:
    """Rates on their own seed, then every seed; one line of the table an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--size", type=int, default=64, help="px, a multiple of 32")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rates", default="3e-3", help="several: the best of each arm, on seed 1000")
    parser.add_argument("--data", default="data/emoji-256", help="folder with train/ and val/ shards")
    parser.add_argument("--images", type=int, default=2000, help="for training")
    parser.add_argument("--held-out", type=int, default=256, help="images")
    parser.add_argument("--width", type=float, default=0.5, help="factor of the file's widths")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = ShardData(f"{args.data}/train", f"{args.data}/val", args.size, workers=0)
    train, held_out = images_of(data, "train", args.images), images_of(data, "val", args.held_out)
    base = yaml.safe_load((conf_dir() / "first_stage" / "dc_f32_small.yaml").read_text())
    for side in ("encoder", "decoder"):
        base[f"{side}_block_out_channels"] = [int(args.width * w) for w in base[f"{side}_block_out_channels"]]
    rates = [float(rate) for rate in args.rates.split(",")]
    found: dict[tuple[str, int, float], float] = {}

    def run(arm: str, seed: int, rate: float) -> None:
        start = time.process_time()
        found[arm, seed, rate] = trained({**base, "shortcut": ARMS[arm]}, seed, rate, train, held_out, args)
        row = {"arm": arm, "seed": seed, "rate": rate, "psnr": found[arm, seed, rate]}
        print(json.dumps(row | {"seconds": time.process_time() - start}), flush=True)

    for arm in ARMS if len(rates) > 1 else ():
        for rate in rates:
            run(arm, SEARCH_SEED, rate)
    best = {arm: max(rates, key=lambda rate: found.get((arm, SEARCH_SEED, rate), 0.0)) for arm in ARMS}
    for seed in range(args.seeds):
        for arm in ARMS:
            run(arm, seed, best[arm])
    print(f"\n| f = 32, {args.size} px, {args.steps} steps of {args.batch} images | rate | PSNR, dB | each seed |")
    print("|---|---|---|---|")
    for arm, rate in best.items():
        each = [found[arm, seed, rate] for seed in range(args.seeds)]
        spread = f" ± {stdev(each):.2f}" if len(each) > 1 else ""
        print(f"| {arm} | {rate:g} | {mean(each):.2f}{spread} | {', '.join(f'{value:.2f}' for value in each)} |")


if __name__ == "__main__":
    main()
