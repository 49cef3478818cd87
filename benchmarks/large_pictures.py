"""Peak memory, time and difference of a first stage on a large picture: at once, in tiles with shared norms, separate.

    python benchmarks/large_pictures.py [--first-stage runs/emoji64/first_stage] [--size 1024] [--tile 512]

--first-stage is a run or the name of a file in conf/first_stage, whose weights are then drawn. The picture is made of
soft blobs. Every variant is a process of its own; memory is what it needs beyond the loaded weights and the picture.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional as F

from ldmlab.build import load_first_stage
from ldmlab.first_stages.tiled import TiledFirstStage
from ldmlab.instantiate import instantiate

VARIANTS = ("at once", "shared", "separate")
CONF = Path(__file__).parents[1] / "conf/first_stage"


def first_stage_of(name: str) -> Any:
    """A trained one, or a configuration with drawn weights."""
    torch.manual_seed(0)
    if Path(name).exists():
        return load_first_stage(name).module
    return instantiate(yaml.safe_load((CONF / f"{name}.yaml").read_text()), where="first_stage").eval()


def picture(size: int) -> torch.Tensor:
    """(1, 3, size, size) in [-1, 1]; the right half is duller, so that tiles have different statistics."""
    torch.manual_seed(0)
    blobs = F.interpolate(torch.randn(1, 3, size // 32, size // 32), (size, size), mode="bicubic")
    return blobs.clamp(-1, 1) * torch.linspace(1, 0.2, size)


def resident_mib() -> float:
    """The highest so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def prepare(args: argparse.Namespace, folder: Path) -> None:
    """The latents to decode, in a process of its own: what it needs is not counted."""
    tiled = TiledFirstStage(first_stage_of(args.first_stage), args.tile, "separate")
    torch.save(tiled.encode(picture(args.size)).mean, folder / "latents.pt")


@torch.no_grad()
def measure(variant: str, args: argparse.Namespace, folder: Path) -> None:
    """One process: encode and decode, each with its memory and time, into a file."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = first_stage_of(args.first_stage).to(device)
    worker = stage if variant == "at once" else TiledFirstStage(stage, args.tile, variant)
    image = picture(args.size).to(device)
    given = image if args.way == "encode" else torch.load(folder / "latents.pt").to(device)
    before = torch.cuda.memory_allocated() / 2**20 if device.type == "cuda" else resident_mib()
    begun = time.perf_counter()
    result = (worker.encode(given).mean if args.way == "encode" else worker.decode(given)).cpu()
    seconds = time.perf_counter() - begun
    after = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else resident_mib()
    torch.save({"result": result, "seconds": seconds, "mib": after - before}, folder / f"{variant}.pt")


def run(process: Any) -> None:
    """Wait for it; a fault in it is ours."""
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"a process ended with {process.exitcode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-stage", default="runs/emoji64/first_stage")
    parser.add_argument("--size", type=int, default=1024, help="side, px (1024)")
    parser.add_argument("--tile", type=int, default=512, help="px (512)")
    parser.add_argument("--way", choices=["encode", "decode"], default="decode")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"{args.way} {args.size} x {args.size} px, {args.first_stage}, tiles of {args.tile}")
    print(f"{'':10}{'peak MiB':>10}{'seconds':>10}{'mean difference / 255':>24}")
    with tempfile.TemporaryDirectory() as folder:
        if args.way == "decode":
            run(context.Process(target=prepare, args=(args, Path(folder))))
        for variant in VARIANTS:
            run(context.Process(target=measure, args=(variant, args, Path(folder))))
            found = torch.load(Path(folder) / f"{variant}.pt")
            whole = torch.load(Path(folder) / "at once.pt")["result"]
            far = (found["result"] - whole).abs().mean() * 127.5
            print(f"{variant:10}{found['mib']:10.0f}{found['seconds']:10.1f}{far:24.4f}", flush=True)


if __name__ == "__main__":
    main()
