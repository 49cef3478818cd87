"""The U-Net's training step, ours against diffusers' UNet2DConditionModel of the same shape.

    python benchmarks/unet_step.py [--rounds 7] [--channels 128] [--latent 4x32x32] [--batch 4] [--compile]

The networks hold equally many parameters and run forward, backward and AdamW in turns in one process; a ratio is the
median over rounds of theirs divided by ours (1.0 or more: at least as fast). As it comes diffusers runs in float32;
tuned it has bfloat16 autocast, as ours has, in either memory layout.
"""

import argparse
from collections.abc import Callable

import _versus
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning

CHANNEL_MULT, RES_BLOCKS, HEADS, TOKENS, WIDTH = (1, 2, 3), 2, 4, 32, 256
ATTENTION = (2, 4)


def ours(latent: int, channels: int) -> UNet:
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


def step_of(name: str, device: torch.device, args: argparse.Namespace) -> Callable[[], None]:
    """The training step of a variant."""
    torch.manual_seed(0)
    c, h, w = (int(n) for n in args.latent.split("x"))
    layout = _versus.layout(name)
    x = torch.randn(args.batch, c, h, w, device=device).contiguous(memory_format=layout)
    t = torch.randint(0, 1000, (args.batch,), device=device)
    tokens, target = torch.randn(args.batch, TOKENS, WIDTH, device=device), torch.randn_like(x)
    bfloat16 = "bfloat16" in name
    if "ldmlab" in name:
        condition = Conditioning(tokens=tokens)
        mine = _versus.compiled(ours(c, args.channels).to(device), name)
        return training_step(mine, lambda: mine(x, t, condition), target, bfloat16)
    network = theirs(c, args.channels).to(device, memory_format=layout)  # type: ignore[call-overload]
    network = _versus.compiled(network, name)
    return training_step(network, lambda: network(x, t, tokens).sample, target, bfloat16)


def flops(args: argparse.Namespace) -> int:
    """Products of forward and backward; one multiplication and one addition are two."""
    c, h, w = (int(n) for n in args.latent.split("x"))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, tokens = torch.empty(args.batch, c, h, w), torch.empty(args.batch, TOKENS, WIDTH)
        ours(c, args.channels)(x, torch.empty(args.batch), Conditioning(tokens=tokens)).sum().backward()
    return int(counter.get_total_flops())


def main() -> None:
    parser = _versus.parser(__doc__, rounds=7)
    parser.add_argument("--channels", type=int, default=128, help="width of the finest level")
    parser.add_argument("--latent", default="4x32x32", help="channels x height x width")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make(4, args.channels).parameters()) for make in (ours, theirs)]
    assert sizes[0] == sizes[1], f"the networks differ: {sizes}"
    title = f"U-Net training step: {sizes[0] / 1e6:.1f}M parameters, batch {args.batch} of {args.latent}"
    make = lambda name, device: step_of(name, device, args)  # noqa: E731
    _versus.run(_versus.Benchmark(title, make, args.batch, lambda: flops(args)), args)


if __name__ == "__main__":
    main()
