"""The U-Net's training step, ours against diffusers' UNet2DConditionModel of the same shape.

    python benchmarks/unet_step.py [--rounds 15] [--channels 96] [--latent 4x16x16] [--batch 16]
                                   [--float32] [--contiguous] [--device cuda]

Both networks hold equally many parameters and run forward, backward and AdamW in turns in one process, in one memory
layout (channels-last unless --contiguous) and, unless --float32, in bfloat16 autocast. The time is the processor time
of this process, so that other jobs on the machine disturb it little; the ratio is the median over rounds of theirs
divided by ours (1.0 or more: at least as fast).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning

CHANNEL_MULT, RES_BLOCKS, HEADS, TOKENS, WIDTH = (1, 2, 3), 2, 4, 32, 256
ATTENTION = (2, 4)


def ours(latent: int, channels: int) -> nn.Module:
    """Our network for the shape above."""
    return UNet(latent, latent, channels, CHANNEL_MULT, RES_BLOCKS, ATTENTION, heads=HEADS, context_width=WIDTH)


def theirs(latent: int, channels: int) -> nn.Module:
    """diffusers' network for the same shape; its `attention_head_dim` is the number of heads."""
    from diffusers import UNet2DConditionModel

    attends = [2**i in ATTENTION for i in range(len(CHANNEL_MULT))]
    return UNet2DConditionModel(
        in_channels=latent,
        out_channels=latent,
        block_out_channels=[channels * m for m in CHANNEL_MULT],
        layers_per_block=RES_BLOCKS,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=HEADS,
        cross_attention_dim=WIDTH,
    )


def training_step(network: nn.Module, call: Callable[[], Tensor], target: Tensor, bfloat16: bool) -> Callable[[], None]:
    """Forward, backward and update as one function."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(target.device.type, torch.bfloat16, enabled=bfloat16):
            output = call()
        torch.nn.functional.mse_loss(output.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def clock(device: torch.device) -> float:
    """Processor seconds of this process; on a GPU wall seconds after its queue is empty."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each network that are timed")
    parser.add_argument("--channels", type=int, default=96, help="width of the finest level")
    parser.add_argument("--latent", default="4x16x16", help="channels x height x width")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--float32", action="store_true", help="no autocast")
    parser.add_argument("--contiguous", action="store_true", help="not channels-last")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def main() -> None:
    args = parse()
    device, bfloat16 = torch.device(args.device), not args.float32
    layout = torch.contiguous_format if args.contiguous else torch.channels_last
    c, h, w = (int(n) for n in args.latent.split("x"))
    torch.manual_seed(0)
    x = torch.randn(args.batch, c, h, w, device=device).contiguous(memory_format=layout)
    t = torch.randint(0, 1000, (args.batch,), device=device)
    tokens, target = torch.randn(args.batch, TOKENS, WIDTH, device=device), torch.randn_like(x)

    a = ours(c, args.channels).to(device, memory_format=layout)  # type: ignore[call-overload]
    b = theirs(c, args.channels).to(device, memory_format=layout)  # type: ignore[call-overload]
    sizes = [sum(p.numel() for p in network.parameters()) for network in (a, b)]
    assert sizes[0] == sizes[1], f"the networks differ: {sizes}"
    condition = Conditioning(tokens=tokens)
    steps = {
        "ldmlab": training_step(a, lambda: a(x, t, condition), target, bfloat16),
        "diffusers": training_step(b, lambda: b(x, t, tokens).sample, target, bfloat16),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(args.rounds + 3):  # the first three warm up
        for name in sorted(steps, reverse=i % 2 == 1):
            start = clock(device)
            steps[name]()
            if i >= 3:
                seconds[name].append(clock(device) - start)
    ratio = statistics.median(b / a for a, b in zip(seconds["ldmlab"], seconds["diffusers"], strict=True))
    dtype = "bfloat16 autocast" if bfloat16 else "float32"
    setting = f"{dtype}, {str(layout).removeprefix('torch.')}, {device}"
    print(f"{sizes[0] / 1e6:.1f}M parameters, batch {args.batch} of {args.latent}, {setting}")
    for name, values in seconds.items():
        print(f"{name:>10}: {statistics.median(values) * 1e3:8.1f} ms a step (median of {len(values)})")
    print(f"ratio diffusers / ldmlab: {ratio:.3f}")


if __name__ == "__main__":
    main()
