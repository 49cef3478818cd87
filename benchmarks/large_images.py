"""A first stage on a large image, at once and in tiles with shared or separate norms: memory, products, difference.

    python benchmarks/large_images.py [--first-stage kl_f8] [--size 1024] [--tile 512] [--run]

Memory and products are counted, not measured: every operation runs without data, and the bytes of all tensors alive
are added up (weights and what a convolution needs while it runs are not in them). So the paper's sizes take seconds on
any machine. With --run the variants also run on an image of soft blobs: seconds, and how far they are from the whole.
"""

import argparse
import time
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ldmlab.app.compose import compose, plain
from ldmlab.build import load_first_stage
from ldmlab.first_stages.tiled import TiledFirstStage
from ldmlab.instantiate import instantiate

VARIANTS = ("at once", "shared", "separate")


class Alive(TorchDispatchMode):
    """Bytes of all tensors that were made inside and are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.users: dict[int, int] = {}  # living tensors of each storage
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor)
        self.peak = max(self.peak, self.now)
        return result

    def _meet(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.users:
            self.users[key] = 0
            self.now += size
        self.users[key] += 1
        weakref.finalize(tensor, self._leave, key, size)

    def _leave(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.now -= size


def first_stage_of(name: str) -> Any:
    """A trained one, or a configuration with random weights."""
    torch.manual_seed(0)
    if Path(name).exists():
        return load_first_stage(name).module
    return instantiate(plain(compose(f"first_stage/{name}", []))["first_stage"], where="first_stage").eval()


def worker_of(variant: str, stage: Any, tile: int) -> Any:
    return stage if variant == "at once" else TiledFirstStage(stage, tile, variant)


@torch.no_grad()
def counted(variant: str, stage: Any, args: argparse.Namespace) -> tuple[float, float]:
    """MiB of tensors at the peak and 10^12 products, without data."""
    empty = stage.to("meta")
    side = args.size if args.way == "encode" else args.size // stage.downsampling
    given = torch.empty(1, 3 if args.way == "encode" else stage.latent_channels, side, side, device="meta")
    worker, products = worker_of(variant, empty, args.tile), FlopCounterMode(display=False)
    attention = 0

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Without data torch would form all scores, which no kernel for CPU or GPU does."""
        nonlocal attention
        attention += 2 * q.numel() * k.shape[2]
        return torch.empty_like(q)

    with mock.patch.object(F, "scaled_dot_product_attention", fused), products, Alive() as alive:
        getattr(worker, args.way)(given)
    return alive.peak / 2**20, (products.get_total_flops() / 2 + attention) / 1e12


@torch.no_grad()
def ran(variant: str, stage: Any, args: argparse.Namespace) -> tuple[float, torch.Tensor]:
    """Seconds and the result."""
    torch.manual_seed(0)
    blobs = F.interpolate(torch.randn(1, 3, args.size // 32, args.size // 32), (args.size, args.size), mode="bicubic")
    given = blobs.clamp(-1, 1) * torch.linspace(1, 0.2, args.size)  # duller to the right: tiles differ
    worker = worker_of(variant, stage, args.tile)
    if args.way == "decode":
        given = TiledFirstStage(stage, args.tile, "separate").encode(given).mean
    begun = time.perf_counter()
    result = worker.encode(given).mean if args.way == "encode" else worker.decode(given)
    return time.perf_counter() - begun, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first-stage", default="kl_f8", help="a run or a name in conf/first_stage (kl_f8)")
    parser.add_argument("--size", type=int, default=1024, help="side, px (1024)")
    parser.add_argument("--tile", type=int, default=512, help="px (512)")
    parser.add_argument("--way", choices=["encode", "decode"], default="decode")
    parser.add_argument("--run", action="store_true", help="also run: seconds and difference")
    args = parser.parse_args()
    print(f"{args.way} {args.size} x {args.size} px, {args.first_stage}, tiles of {args.tile}, float32")
    print(f"{'':10}{'peak MiB':>10}{'10^12 products':>16}{'seconds':>10}{'mean difference / 255':>24}")
    whole = None
    for variant in VARIANTS:
        with torch.device("meta"):
            mib, products = counted(variant, first_stage_of(args.first_stage), args)
        line = f"{variant:10}{mib:10.0f}{products:16.2f}"
        if args.run:
            seconds, result = ran(variant, first_stage_of(args.first_stage), args)
            whole = result if whole is None else whole
            line += f"{seconds:10.1f}{float((result - whole).abs().mean() * 127.5):24.4f}"
        print(line, flush=True)


if __name__ == "__main__":
    main()
