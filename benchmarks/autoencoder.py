"""Encoding and decoding images, our KL autoencoder against diffusers' AutoencoderKL of the same shape.

    python benchmarks/autoencoder.py [--rounds 5] [--channels 128] [--size 128] [--batch 1] [--compile]

f = 8 with the paper's widths (1, 2, 4, 4). As it comes diffusers runs in float32; tuned it holds bfloat16 weights, in
either memory layout; ours holds them channels-last.
"""

import argparse
from collections.abc import Callable

import _versus
import torch
from torch import nn

from ldmlab.evaluation.flops import flops_of
from ldmlab.first_stages.kl import KLAutoencoder

CHANNEL_MULT, LATENT = (1, 2, 4, 4), 4


def ours(channels: int) -> KLAutoencoder:
    """kl-f8 of the width."""
    return KLAutoencoder(channel_mult=CHANNEL_MULT, latent_channels=LATENT, channels=channels)


def theirs(channels: int) -> nn.Module:
    """The same in diffusers."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[channels * m for m in CHANNEL_MULT],
        down_block_types=["DownEncoderBlock2D"] * len(CHANNEL_MULT),
        up_block_types=["UpDecoderBlock2D"] * len(CHANNEL_MULT),
        layers_per_block=2,
        latent_channels=LATENT,
    )


def work_of(direction: str, name: str, device: torch.device, args: argparse.Namespace) -> Callable[[], object]:
    """One pass of a variant, without gradients."""
    torch.manual_seed(0)
    side, half = args.size, "bfloat16" in name
    dtype, layout = (torch.bfloat16 if half else torch.float32), _versus.layout(name)
    if half and "ldmlab" in name:
        layout = torch.channels_last
    stage = (ours if "ldmlab" in name else theirs)(args.channels).to(device, dtype, memory_format=layout).eval()  # type: ignore[call-overload]
    shape = (args.batch, 3, side, side) if direction == "encode" else (args.batch, LATENT, side // 8, side // 8)
    x = (torch.rand(shape, device=device) * 2 - 1).to(dtype, memory_format=layout)
    call = _versus.compiled(getattr(stage, direction), name)

    @torch.no_grad()
    def once() -> object:
        return call(x)

    return once


def flops(direction: str, args: argparse.Namespace) -> int:
    """Products of one pass."""
    side = args.size if direction == "encode" else args.size // 8
    with torch.device("meta"), torch.no_grad():
        x, stage = torch.empty(args.batch, 3 if direction == "encode" else LATENT, side, side), ours(args.channels)
        return flops_of(lambda: getattr(stage, direction)(x))


def main() -> None:
    parser = _versus.parser(__doc__, rounds=5)
    parser.add_argument("--channels", type=int, default=128, help="width of the finest level")
    parser.add_argument("--size", type=int, default=128, help="of the images, pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--direction", choices=("encode", "decode"), action="append", help="default: both")
    args = parser.parse_args()
    for direction in args.direction or ("encode", "decode"):
        title = f"autoencoder, {direction}: batch {args.batch} of {args.size}x{args.size}, {args.channels} wide"
        benchmark = _versus.Benchmark(
            title,
            lambda name, device, direction=direction: work_of(direction, name, device, args),  # type: ignore[misc]
            args.batch,
            lambda direction=direction: flops(direction, args),  # type: ignore[misc]
            only=("--direction", direction),
        )
        _versus.run(benchmark, args)


if __name__ == "__main__":
    main()
