"""First stages of codes at equal bits and equal steps: PSNR, use and entropy of the codes on held-out images.

python benchmarks/quantisers.py --train data/emoji-256/train --held-out data/emoji-256/val --out runs/quantisers.json

Each is `first_stage=*_f4_small` with `loss=*_pixel`, at --channels and near 10 bits a code, trained by Adam from
--seeds first weights on the same batches. One thread. Finished runs in --out are kept: a stopped comparison goes on.
"""

import argparse
import io
import json
import math
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldmlab.app.compose import compose, plain
from ldmlab.instantiate import instantiate
from ldmlab.metrics.reconstruction import codebook_use

KINDS: dict[str, list[str]] = {  # options beside first_stage and loss
    "vq": [],
    "fsq": [],
    "lfq": [],
    "bsq": [],
    "ibq": [],
    "vq, restarts": ["first_stage.restart_below=0.01"],
    "fsq, sigmoid": ["first_stage.quantiser.levels=[7,7,7,3]", "first_stage.quantiser.activation=sigmoid"],
}


def images(folder: Path, side: int) -> Tensor:
    """All images of a folder of shards, uint8 (N, 3, side, side)."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith((".webp", ".png", ".jpg")):
                    picture = Image.open(io.BytesIO(shard.extractfile(member).read())).convert("RGB")  # type: ignore[union-attr]
                    found.append(np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


def parts(kind: str, channels: int) -> tuple[Any, Any]:
    """First stage and loss, as the files of conf/ say."""
    name = kind.partition(",")[0]
    words = [f"first_stage={name}_f4_small", f"loss={name}_pixel", f"first_stage.channels={channels}"]
    words.append(f"first_stage.norm_groups={min(channels, 16)}")
    config = plain(compose("train", ["stage=autoencoder", "data.train=x", "data.val=x", *words, *KINDS[kind]]))
    return (instantiate(config[group], where=group, trust=True) for group in ("first_stage", "loss"))  # type: ignore[return-value]


def floats(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def trained(kind: str, seed: int, pictures: Tensor, args: argparse.Namespace) -> Any:
    """A first stage after --steps updates."""
    torch.manual_seed(seed)
    stage, loss = parts(kind, args.channels)
    optimizer = torch.optim.Adam(stage.parameters(), lr=args.rate, betas=(0.9, 0.99))
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.rate, args.steps, pct_start=0.05, cycle_momentum=False)
    order = torch.Generator().manual_seed(seed)
    for step in range(args.steps):
        batch = floats(pictures[torch.randint(len(pictures), (args.batch,), generator=order)])
        total, _ = loss.autoencoder(batch, stage.reconstruct(batch, batch.new_empty(0)), stage.last_layer, step)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        stage.update_codebook()
        rates.step()
    return stage.eval()


@torch.no_grad()
def measured(stage: Any, pictures: Tensor) -> dict[str, float]:
    """PSNR, mean over images of [0, 255], and the use, perplexity and entropy of all their codes."""
    counts = torch.zeros(stage.codebook_size, dtype=torch.int64)
    psnr = []
    for part in pictures.split(64):
        latents = stage.encode(floats(part)).mean
        counts += stage.quantiser.codes_of(latents).flatten().bincount(minlength=stage.codebook_size)
        seen = ((stage.decode(latents).clamp(-1, 1) + 1) * 127.5).round()
        error = (seen - part.float()).square().mean(dim=(1, 2, 3)).clamp_min(1e-3)
        psnr.append(10 * torch.log10(255**2 / error))
    return {"psnr": float(torch.cat(psnr).mean()), "bits": math.log2(stage.codebook_size), **codebook_use(counts)}


def row(kind: str, runs: list[dict[str, float]]) -> str:
    """Means over seeds, with the deviation between seeds."""

    def cell(name: str, digits: int, factor: float = 1) -> str:
        values = torch.tensor([run[name] * factor for run in runs], dtype=torch.float64)
        spread = f" ± {float(values.std()):.{digits}f}" if len(runs) > 1 else ""
        return f"{float(values.mean()):.{digits}f}{spread}"

    bits = f"{runs[0]['bits']:.2f}"
    cells = (cell("psnr", 2), f"{cell('codebook_use', 1, 100)} %", cell("codebook_entropy", 2), cell("seconds", 0))
    return f"| {kind} | {bits} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--train", type=Path, required=True, help="folder of shards")
    parser.add_argument("--held-out", type=Path, required=True, help="folder of shards that are measured")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of finished runs")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--size", type=int, default=32, help="of the images, pixels")
    parser.add_argument("--channels", type=int, default=8, help="width of the finest level")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = ("train", "held_out", "steps", "size", "channels", "batch", "rate")
    settings = {name: str(getattr(args, name)) for name in names}
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"settings": settings, "runs": {}}
    if done["settings"] != settings:
        parser.error(f"{args.out} holds runs of other settings: {done['settings']}; give another --out")
    training, held_out = images(args.train, args.size), images(args.held_out, args.size)
    for seed in range(args.seeds):
        for kind in args.kinds:
            if (key := f"{kind}/{seed}") not in done["runs"]:
                start = time.process_time()
                stage = trained(kind, seed, training, args)
                seconds = time.process_time() - start
                done["runs"][key] = measured(stage, held_out) | {"seconds": seconds}
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(done, indent=1))
                print(key, done["runs"][key], flush=True)
    print(f"{len(training):,} images to train, {len(held_out):,} held out, {args.size} px, {args.steps} steps")
    print(
        "| quantiser | bits | PSNR (dB) | codes used | entropy (bits) | processor time (s) |\n|---|---|---|---|---|---|"
    )
    for kind in args.kinds:
        print(row(kind, [done["runs"][f"{kind}/{seed}"] for seed in range(args.seeds)]))


if __name__ == "__main__":
    main()
