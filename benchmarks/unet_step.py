"""The U-Net's training step, ours against diffusers' UNet2DConditionModel of the same shape.

    python benchmarks/unet_step.py [--rounds 7] [--channels 128] [--latent 4x32x32] [--batch 4] [--compile]

The networks hold equally many parameters and run forward, backward and AdamW in turns in one process; a ratio is the
median over rounds of theirs divided by ours (1.0 or more: at least as fast). As it comes diffusers runs in float32;
tuned it has bfloat16 autocast, as ours has, in either memory layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import _versus
import torch
from torch import Tensor, nn

from ldmlab.backbones.unet import UNet
from ldmlab.contracts import Conditioning
from ldmlab.evaluation.flops import flops_of


@dataclass(frozen=True)
class Shape:
    """A U-Net with token conditioning, and a batch for it."""

    channels: int = 128  # width of the finest level
    latent: tuple[int, int, int] = (4, 32, 32)  # channels, height, width
    batch: int = 4
    channel_mult: tuple[int, ...] = (1, 2, 3)
    attention: tuple[int, ...] = (2, 4)  # downsampling factors of the levels that attend
    heads: int = 4
    tokens: int = 32
    width: int = 256  # of a token


def ours(shape: Shape) -> UNet:
    """Our network."""
    c, levels = shape.latent[0], shape.channel_mult
    return UNet(c, c, shape.channels, levels, 2, shape.attention, heads=shape.heads, context_width=shape.width)


def theirs(shape: Shape) -> nn.Module:
    """The same network in diffusers, whose `attention_head_dim` is the number of heads."""
    from diffusers import UNet2DConditionModel

    attends = [2**i in shape.attention for i in range(len(shape.channel_mult))]
    return UNet2DConditionModel(
        in_channels=shape.latent[0],
        out_channels=shape.latent[0],
        block_out_channels=[shape.channels * m for m in shape.channel_mult],
        layers_per_block=2,
        down_block_types=["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        up_block_types=["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
        attention_head_dim=shape.heads,
        cross_attention_dim=shape.width,
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


def step_of(name: str, device: torch.device, shape: Shape) -> Callable[[], None]:
    """The training step of a variant."""
    torch.manual_seed(0)
    layout = _versus.layout(name)
    x = torch.randn(shape.batch, *shape.latent, device=device).contiguous(memory_format=layout)
    t = torch.randint(0, 1000, (shape.batch,), device=device)
    tokens, target = torch.randn(shape.batch, shape.tokens, shape.width, device=device), torch.randn_like(x)
    bfloat16 = "bfloat16" in name
    if "ldmlab" in name:
        condition = Conditioning(tokens=tokens)
        mine = _versus.compiled(ours(shape).to(device), name)
        return training_step(mine, lambda: mine(x, t, condition), target, bfloat16)
    network = theirs(shape).to(device, memory_format=layout)  # type: ignore[call-overload]
    network = _versus.compiled(network, name)
    return training_step(network, lambda: network(x, t, tokens).sample, target, bfloat16)


def flops(shape: Shape) -> int:
    """Products of forward and backward; one multiplication and one addition are two."""
    with torch.device("meta"):
        x, tokens = torch.empty(shape.batch, *shape.latent), torch.empty(shape.batch, shape.tokens, shape.width)
        network, t = ours(shape), torch.empty(shape.batch)
        return flops_of(lambda: network(x, t, Conditioning(tokens=tokens)).sum().backward())


def main() -> None:
    parser = _versus.parser(__doc__, rounds=7)
    parser.add_argument("--channels", type=int, default=128, help="width of the finest level")
    parser.add_argument("--latent", default="4x32x32", help="channels x height x width")
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    c, h, w = (int(n) for n in args.latent.split("x"))
    shape = Shape(args.channels, (c, h, w), args.batch)
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in make(shape).parameters()) for make in (ours, theirs)]
    assert sizes[0] == sizes[1], f"the networks differ: {sizes}"
    title = f"U-Net training step: {sizes[0] / 1e6:.1f}M parameters, batch {args.batch} of {args.latent}"
    make = lambda name, device: step_of(name, device, shape)  # noqa: E731
    _versus.run(_versus.Benchmark(title, make, args.batch, lambda: flops(shape)), args)


if __name__ == "__main__":
    main()
