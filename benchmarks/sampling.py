"""Guided text-to-image sampling, our DDIM loop and decoder against diffusers' U-Net, DDIMScheduler and AutoencoderKL.

    python benchmarks/sampling.py [--steps 10] [--rounds 3] [--channels 64] [--batch 2] [--compile]

From token states and noise to pixels at guidance 3, conditioned and unconditioned halves in one pass, as both do. As
it comes diffusers runs in float32; tuned it holds bfloat16 weights, as ours does. One round of each variant warms up.
Steps cost the same one by one, so few of them tell the ratio; the decoder's share is that of 50 with --steps 50. Peak
memory, which does not depend on their number, is taken with two.
"""

import argparse

import _versus
import autoencoder
import torch
import unet_step

from ldmlab.contracts import Conditioning
from ldmlab.diffusion.guidance import Guidance
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.evaluation.flops import flops_of
from ldmlab.samplers.ddim import Ddim

GUIDANCE, SCALE = 3.0, 0.18215


def our_work(name: str, device: torch.device, args: argparse.Namespace, inputs: list[torch.Tensor]) -> _versus.Work:
    """Denoise with our sampler, decode."""
    noise, given, null = inputs
    dtype = torch.bfloat16 if "bfloat16" in name else torch.float32
    unet = _versus.compiled(unet_step.ours(args.shape).to(dtype), name)
    stage, schedule = autoencoder.ours(args.decoder).to(dtype), Schedule("scaled_linear")
    model = LatentDiffusion(stage, LatentScale(SCALE), unet, {}, schedule, EpsPrediction(), guidance_trained=True)
    model.to(device).eval()
    if device.type == "cuda":  # as a loaded model
        model.to(memory_format=torch.channels_last)
    grid = ddim_grid(schedule, args.steps)

    @torch.no_grad()
    def once() -> torch.Tensor:
        denoise = model.denoiser(Conditioning(tokens=given), Conditioning(tokens=null), Guidance(GUIDANCE))
        return model.decode(Ddim()(denoise, noise, grid, noise=lambda step: noise))

    return once


def their_work(name: str, device: torch.device, args: argparse.Namespace, inputs: list[torch.Tensor]) -> _versus.Work:
    """The loop of diffusers' text-to-image pipelines."""
    from diffusers import DDIMScheduler

    dtype, layout = torch.bfloat16 if "bfloat16" in name else torch.float32, _versus.layout(name)
    noise, prompt, null = (tensor.to(dtype) for tensor in inputs)
    unet = unet_step.theirs(args.shape).to(device, dtype, memory_format=layout).eval()  # type: ignore[call-overload]
    stage = autoencoder.theirs(args.decoder).to(device, dtype, memory_format=layout).eval()  # type: ignore[call-overload]
    unet = _versus.compiled(unet, name)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    scheduler.set_timesteps(args.steps)
    tokens = torch.cat([null, prompt])

    @torch.no_grad()
    def once() -> torch.Tensor:
        x = noise
        for t in scheduler.timesteps:
            without, given = unet(torch.cat([x, x]), t, tokens).sample.chunk(2)
            x = scheduler.step(without + GUIDANCE * (given - without), t, x).prev_sample
        return stage.decode(x / SCALE).sample

    return once


def work_of(name: str, device: torch.device, args: argparse.Namespace) -> _versus.Work:
    """Sampling of a variant from its noise and token states."""
    torch.manual_seed(0)
    shape: unet_step.Shape = args.shape
    noise = torch.randn(shape.batch, *shape.latent, device=device)
    given, null = (torch.randn(shape.batch, shape.tokens, shape.width, device=device) for _ in range(2))
    return (our_work if "ldmlab" in name else their_work)(name, device, args, [noise, given, null])


def flops(args: argparse.Namespace) -> int:
    """Products of all passes of the U-Net and of the decoder."""
    shape: unet_step.Shape = args.shape
    with torch.device("meta"), torch.no_grad():
        tokens = Conditioning(tokens=torch.empty(2 * shape.batch, shape.tokens, shape.width))
        x, t = torch.empty(2 * shape.batch, *shape.latent), torch.empty(2 * shape.batch)
        unet, stage = unet_step.ours(shape), autoencoder.ours(args.decoder)
        return args.steps * flops_of(lambda: unet(x, t, tokens)) + flops_of(lambda: stage.decode(x[: shape.batch]))


def main() -> None:
    parser = _versus.parser(__doc__, rounds=3)
    parser.add_argument(
        "--channels", type=int, default=64, help="width of the U-Net's finest level, twice the decoder's"
    )
    parser.add_argument("--latent", type=int, default=32, help="height and width of the latent")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()

    args.decoder = args.channels // 2
    args.shape = unet_step.Shape(args.channels, (4, args.latent, args.latent), args.batch, tokens=77)
    side = 8 * args.latent
    make = lambda name, device: work_of(name, device, args)  # noqa: E731
    title = f"sampling: {args.batch} images of {side}x{side}, {args.steps} steps, guidance {GUIDANCE:g}"
    _versus.run(_versus.Benchmark(title, make, args.batch, lambda: flops(args), only=("--steps", "2")), args)


if __name__ == "__main__":
    main()
