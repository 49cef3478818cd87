"""What a GPU machine reaches, in one table: ours, eager and compiled, beside diffusers in the same run.

    python benchmarks/gpu.py                     all sections, about half an hour on one card
    python benchmarks/gpu.py --section resume    one of them; may be given several times
    python benchmarks/gpu.py --cpu-smoke         tiny networks on a CPU: whether this program works, no speed

Times are medians over rounds with an empty queue; memory is the peak of all tensors. MFU is the rate of the networks'
products over that of the card's data sheet (`ldmlab.nn.cards`), or, of a card that is not listed there, over that of
the fastest bfloat16 product measured in this run. Weights are random: speed does not depend on them. The last section
trains on the card, stops, resumes, and compares all tensors with a run that did not stop.
"""

import argparse
import gc
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import _versus
import autoencoder
import diffusers
import sampling
import torch
import unet_step
from torch import Tensor, nn

import metrics
from ldmlab.checkpoints import load_checkpoint
from ldmlab.contracts import Reconstruction
from ldmlab.evaluation.flops import flops_of
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.nn import compiling
from ldmlab.nn.cards import card_named
from ldmlab.nn.lpips import LPIPS

ROOT = Path(__file__).parents[1]
OURS, THEIRS = _versus.OURS, _versus.TUNED
NAMES = (OURS, OURS + _versus.COMPILED, THEIRS, THEIRS + _versus.COMPILED)
Variant = tuple[str, Callable[[], _versus.Work]]  # name, and what builds one round of it

LDM_4 = unet_step.Shape(192, (3, 64, 64), 60, (1, 2, 3, 5), (2, 4, 8), heads=1, tokens=1, width=512)
SD = unet_step.Shape(320, (4, 64, 64), 16, (1, 2, 4, 4), (1, 2, 4), heads=8, tokens=77, width=768)
TINY = unet_step.Shape(32, (4, 4, 4), 2, (1, 2), (2,), heads=2, tokens=3, width=16)


def training(shape: unet_step.Shape, device: torch.device) -> Iterator[Variant]:
    """Forward, backward and update of a U-Net."""
    for name in NAMES:
        yield name, lambda name=name: unet_step.step_of(name, device, shape)  # type: ignore[misc]


def encoding(size: SimpleNamespace, device: torch.device) -> Iterator[Variant]:
    """Images to latents with kl-f8."""
    args: Any = SimpleNamespace(size=size.pixels, batch=size.batch, channels=size.channels)
    for name in NAMES:
        yield name, lambda name=name: autoencoder.work_of("encode", name, device, args)  # type: ignore[misc]


def guided(size: SimpleNamespace, device: torch.device) -> Iterator[Variant]:
    """From token states to pixels, with guidance."""
    args: Any = SimpleNamespace(shape=size.shape, decoder=size.channels, steps=size.steps)
    for name in NAMES:
        yield name, lambda name=name: sampling.work_of(name, device, args)  # type: ignore[misc]


def features(batch: int, device: torch.device) -> Iterator[Variant]:
    """Images of 256 px to the features of FID."""
    images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8, device=device)

    def build(name: str) -> _versus.Work:
        with tempfile.TemporaryDirectory() as folder:
            network = metrics.extractors(Path(folder), device)[name]
        return lambda: network(images)

    yield "ldmlab", lambda: build("ours")
    yield "torch-fidelity", lambda: build("torch-fidelity")


class Theirs(nn.Module):
    """diffusers' autoencoder as our loss takes one."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.last_layer = network, network.decoder.conv_out.weight

    def reconstruct(self, images: Tensor, noise: Tensor) -> Reconstruction:
        posterior = self.network.encode(images).latent_dist
        decoded = self.network.decode(posterior.mean + posterior.std * noise).sample
        return Reconstruction(decoded, {"kl": posterior.kl().mean()})


def perceptual() -> LPIPS:
    """With random weights."""
    import torchvision

    with torch.device("meta"):
        shapes = {k: v.shape for k, v in torchvision.models.vgg16(weights=None).features.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vgg.pth"
        torch.save(
            {f"features.{k}": torch.randn(s) / max(s.numel() // s[0], 1) ** 0.5 for k, s in shapes.items()}, path
        )
        return LPIPS(path)


def first_stage(size: SimpleNamespace, device: torch.device) -> Iterator[Variant]:
    """Both updates of kl-f8 with LPIPS and the patch adversary; diffusers' network under the same loss."""

    def build(name: str) -> _versus.Work:
        torch.manual_seed(0)
        mine = "ldmlab" in name
        stage: Any = autoencoder.ours(size.channels) if mine else Theirs(autoencoder.theirs(size.channels))
        critic = Adversary(discriminator=PatchDiscriminator(), weight=0.5, discriminator_start=0, adversary_start=0)
        weights: Any = {"penalty_weights": {"kl": 1e-6}, "lpips_weight": 1.0, "reduction": "sum_per_image"}
        loss = AutoencoderLoss(**weights, adversary=critic, lpips=perceptual())
        for module in (stage, loss):
            module.to(device, memory_format=torch.channels_last)
        if name.endswith(_versus.COMPILED) and mine:
            compiling.compile_regions(stage, loss)
        elif name.endswith(_versus.COMPILED):
            stage.network.encoder.compile(backend=compiling.BACKEND)
            stage.network.decoder.compile(backend=compiling.BACKEND)
        groups = [list(stage.parameters()), list(critic.parameters())]
        optimizers = [torch.optim.AdamW(group, lr=1e-5, fused=True) for group in groups]
        images = torch.rand(size.batch, 3, size.pixels, size.pixels, device=device) * 2 - 1
        images = images.contiguous(memory_format=torch.channels_last)
        noise = torch.randn(size.batch, autoencoder.LATENT, size.pixels // 8, size.pixels // 8, device=device)

        def step() -> None:
            critic.requires_grad_(False)
            with torch.autocast(device.type, torch.bfloat16):
                given = stage.reconstruct(images, noise)
                loss.autoencoder(images, given, stage.last_layer, 0)[0].backward()
                critic.requires_grad_(True)
                loss.discriminator(images, given.images)[0].backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return step

    for name in NAMES:
        yield name, lambda name=name: build(name)  # type: ignore[misc]


def measure(
    title: str, images: int, variants: Iterator[Variant], rounds: int, peak: float, device: torch.device
) -> None:
    """A line for each variant; the products are counted in the first round of the first one, which is eager."""
    print(f"\n{title}, batch {images}", flush=True)
    flops, best = 0, {}
    for name, build in variants:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        work = build()
        flops = flops or flops_of(work)
        start = time.perf_counter()
        for _ in range(2):
            work()
        warm = time.perf_counter() - start
        seconds = []
        for _ in range(rounds):
            start = _wall(device)
            work()
            seconds.append(_wall(device) - start)
        value = statistics.median(seconds)
        memory = f"{torch.cuda.max_memory_allocated() / 2**30:6.1f} GiB" if device.type == "cuda" else "       - "
        rate = flops / value
        print(
            f"  {name:48s} {value * 1e3:9.1f} ms {images / value:9.2f} images/s {rate / 1e12:7.1f} TFLOP/s "
            f"{rate / peak:5.0%} MFU {memory}  warm-up {warm:.0f} s",
            flush=True,
        )
        side = "ldmlab" if name.startswith("ldmlab") else "the other"
        best[side] = min(value, best.get(side, value))
        del work
    print(f"  ldmlab is {best['the other'] / best['ldmlab']:.2f} times as fast, the best of each side")


def _wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def product_rate(device: torch.device, side: int) -> float:
    """FLOP/s of the fastest bfloat16 matrix product of ten."""
    square = torch.randn(side, side, device=device).bfloat16()
    seconds = []
    for _ in range(12):
        start = _wall(device)
        square @ square
        seconds.append(_wall(device) - start)
    return float(2 * side**3 / min(seconds[2:]))


def resume(accelerator: str) -> None:
    """A first stage for 6 steps, and for 3 and then 6: every tensor of the last checkpoints."""
    print("\nresume: 6 steps against 3, a new process, and 3 more", flush=True)
    options = ["experiment=mine/first_stage", "lr_schedule=constant_warmup_50", "logger=csv"]
    options += ["callbacks=quiet", "data.workers=2"]
    options += [f"data.{split}=data/emoji-256/{split}" for split in ("train", "val")]
    options += ["data.image_size=32", "trainer.micro_batch=8", "trainer.validate_every=6", "first_stage.channels=32"]
    with tempfile.TemporaryDirectory() as folder:
        for run, steps in (("straight", 6), ("stopped", 3), ("stopped", 6)):
            own = [f"run.dir={folder}/{run}", f"trainer.max_steps={steps}", f"trainer.accelerator={accelerator}"]
            command = [sys.executable, str(ROOT / "train.py"), *options, *own]
            subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        ends = [
            load_checkpoint(Path(folder) / run / "checkpoints/step_00000006.ckpt") for run in ("straight", "stopped")
        ]
    one, other = (dict(_tensors({name: end[name] for name in ("modules", "averaged", "optimizers")})) for end in ends)
    apart = [name for name, value in one.items() if not torch.equal(value, other[name])]
    largest = max((float((one[name].double() - other[name].double()).abs().max()) for name in apart), default=0.0)
    verdict = "bit-identical" if not apart else f"{len(apart)} differ, by {largest:.1e} at most, such as {apart[0]}"
    print(f"  {len(one)} tensors: {verdict}")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(part, f"{name}/{key}")


SECTIONS = ("ldm4", "sd", "encode", "sampling", "features", "first_stage", "resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="timed rounds of each variant (10)")
    parser.add_argument("--section", choices=SECTIONS, action="append", help="only this one; repeatable (all)")
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny networks on a CPU")
    args = parser.parse_args()
    tiny = args.cpu_smoke
    if not tiny and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here, so there is nothing to measure; --cpu-smoke tries the program.")
    device, rounds = torch.device("cpu" if tiny else "cuda"), 1 if tiny else args.rounds
    if tiny:
        compiling.BACKEND = "eager"  # the compiler of kernels would take minutes
        torch.set_num_threads(1)  # threads that share so little work wait for each other, on a busy machine for long
    else:
        torch.backends.cudnn.benchmark = True
    warnings.filterwarnings("ignore", "Dynamo detected a call")  # of diffusers
    diffusers.utils.logging.set_verbosity_error()
    reached = product_rate(device, 256 if tiny else 8192)
    name = "CPU, tiny networks: no speed" if tiny else torch.cuda.get_device_name()
    card = card_named(name)
    peak = reached if card is None else card.half * 1e12
    products = f"bfloat16 products {reached / 1e12:.1f} TFLOP/s, MFU is of {peak / 1e12:.1f}"
    print(f"{name}; torch {torch.__version__}; {products}")
    chosen = args.section or SECTIONS
    ldm, sd = (TINY, TINY) if tiny else (LDM_4, SD)
    image = (
        SimpleNamespace(pixels=32, batch=1, channels=32) if tiny else SimpleNamespace(pixels=512, batch=8, channels=128)
    )
    samples = SimpleNamespace(shape=TINY, channels=32, steps=2)
    if not tiny:
        samples = SimpleNamespace(shape=unet_step.Shape(**{**vars(SD), "batch": 4}), channels=128, steps=50)
    work: dict[str, tuple[str, int, Iterator[Variant]]] = {
        "ldm4": ("training step, LDM-4 ImageNet", ldm.batch, training(ldm, device)),
        "sd": ("training step, U-Net of Stable Diffusion 1", sd.batch, training(sd, device)),
        "encode": (f"encode {image.pixels} px", image.batch, encoding(image, device)),
        "sampling": (f"guided sampling, {samples.steps} steps", samples.shape.batch, guided(samples, device)),
        "features": ("FID features", 2 if tiny else 64, features(2 if tiny else 64, device)),
        "first_stage": ("first-stage step with adversary and LPIPS", image.batch, first_stage(image, device)),
    }
    for section in SECTIONS[:-1]:
        if section in chosen:
            measure(*work[section], rounds, peak, device)
    if "resume" in chosen:
        resume("cpu" if tiny else "gpu")


if __name__ == "__main__":
    main()
