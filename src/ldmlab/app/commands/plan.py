"""`ldmlab plan`: what a training run costs, before a GPU is paid for.

It needs no weights, data or network; options are key=value, as for train:
  ldmlab plan experiment=paper/class/imagenet_ldm_4 --devices 8
  ldmlab plan experiment=paper/text/sd1 --card a100-40gb --devices 16 --mfu 0.4 --price 1.9
first_stage=NAME is the architecture that encoded the latents. Without data.latents, stored latents are assumed, except
for tasks that change images, pixels and from_run. Memory is that of eager training on one card, which holds all
weights, or its shard with trainer=fsdp (hsdp: over the GPUs of a machine, trainer.devices, else 8). A tenth of the card
is left for the CUDA context, kernels' workspace and fragmentation.
"""

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any

from ldmlab.app.cli import at_least
from ldmlab.app.compose import compose, plain
from ldmlab.app.conf_files import check_added, check_choices, check_names, chosen_options, find_file
from ldmlab.errors import InputError, one_of
from ldmlab.nn.cards import CARDS

USED = 0.9  # of a card's memory, at most


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="key=value", help="options of conf/train.yaml")
    add("--card", default="h100-80gb", help=f"{' | '.join(CARDS)} (h100-80gb)")
    add("--memory-gib", type=float, metavar="GIB", help="instead of the card's memory")
    add("--devices", type=int, default=1, metavar="N", help="GPUs, one process each (1)")
    add("--mfu", type=float, default=0.35, metavar="SHARE", help="of the card's products that training reaches (0.35)")
    add("--price", type=float, default=2.5, metavar="PRICE", help="of a GPU for an hour (2.5)")
    add("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> None:
    one_of("--card", args.card, CARDS)
    at_least(args, devices=1)
    for name, most in (("mfu", 1.0), ("price", 1e6), ("memory_gib", 1e6)):
        value = getattr(args, name)
        if value is not None and not 0 < value <= most:
            raise InputError(f"--{name.replace('_', '-')} {value} must be above 0 and at most {most:g}.")
    config = plain(compose("train", ["++data.train=unread", "++data.val=unread", *args.overrides]))
    check_added("train", args.overrides)
    check_as_train(config, args.overrides)
    check_first_stage(config, args.overrides)
    card = CARDS[args.card]
    found = planned(config, args.memory_gib or card.memory_gib, args.devices)
    found |= cost(found, card.tflops(found["precision"]) * args.mfu, args.price)
    print(json.dumps(found, indent=2) if args.json else table(found, args))


def check_as_train(config: dict[str, Any], words: Sequence[str]) -> None:
    """Refuse what training refuses of these options; a first stage is named for the latents of a plan."""
    from ldmlab.app.teacher import taught

    check_names(config)
    own = config["stage"]["name"] in ("diffusion", "classifier")
    chosen = {name for name in chosen_options(words) if not (own and re.match(r"first_stage\b", name))}
    check_choices(config, chosen)
    taught(config, chosen)


def check_first_stage(config: dict[str, Any], words: Sequence[str]) -> None:
    """Refuse an experiment that leaves its first stage to the latents: the default one would be counted."""
    name = next((word.partition("=")[2] for word in words if word.startswith("experiment=")), "")
    typed = any(re.match(r"\+?first_stage[=.]", word) for word in words)
    if name and not typed and config["stage"]["name"] in ("diffusion", "classifier") and not _names_one(name):
        raise InputError(
            f"experiment={name} takes its first stage from the latents, which a plan does not read; name its "
            "architecture: first_stage=NAME, a file of conf/first_stage."
        )


def _names_one(experiment: str) -> bool:
    """Whether the file of an experiment, or the one that it builds on, chooses a first stage."""
    file = find_file(f"experiment/{experiment}")
    text = file.read_text(encoding="utf-8") if file else ""
    parents = re.findall(r"^  - ([a-z]\w*/[\w/]+)$", text, re.MULTILINE)
    return "override /first_stage:" in text or any(map(_names_one, parents))


def planned(config: dict[str, Any], card_gib: float, devices: int) -> dict[str, Any]:
    """Parameters, FLOPs, the largest micro-batch that fits the card and divides the batch, and its memory by kind."""
    from ldmlab.app.estimate import estimate
    from ldmlab.instantiate import instantiate
    from ldmlab.training.settings import images_a_step, trainer_node

    node = trainer_node(config["trainer"])
    settings = instantiate({**node, "global_batch": None, "accumulate": 1}, where="trainer")
    images = images_a_step(node, devices)
    if images % devices:
        raise InputError(f"--devices {devices} does not divide trainer.global_batch={images}; use a number that does.")
    counted, each = estimate(config, settings, devices=devices), images // devices
    sizes = [size for size in range(1, each + 1) if each % size == 0]
    if config["stage"]["name"] == "clip":  # its loss compares the pairs of a micro-batch, so that is given
        sizes = [settings.micro_batch]
    micro = max((n for n in sizes if sum(counted.memory(n).values()) <= USED * card_gib * 2**30), default=None)
    kinds = {kind: size / 2**30 for kind, size in counted.memory(micro or sizes[0]).items()}
    return {
        "stage": config["stage"]["name"],
        "parameters": counted.parameters,
        "card_gib": card_gib,
        "devices": devices,
        "global_batch": images,
        "micro_batch": micro,
        "accumulate": each // micro if micro else None,
        "memory_gib": kinds,
        "peak_gib": sum(kinds.values()),
        "sharded": settings.strategy in ("fsdp", "hsdp"),
        "trained_gib": counted.trained / 2**30,
        "configured_micro_batch": settings.micro_batch,
        "configured_peak_gib": sum(counted.memory(settings.micro_batch).values()) / 2**30,
        "tflop_an_image": counted.flops / 1e12,
        "tflop_a_step": counted.flops * images / 1e12,
        "precision": settings.precision,
        "steps": settings.max_steps,
        "images": settings.max_steps * images,
    }


def cost(found: dict[str, Any], tflops: float, price: float) -> dict[str, float]:
    """Hours on all devices, GPU-hours and what they cost; tflops: that one card reaches."""
    hours = found["tflop_a_step"] * found["steps"] / (tflops * found["devices"]) / 3600
    return {"hours": hours, "gpu_hours": hours * found["devices"], "cost": hours * found["devices"] * price}


def table(found: dict[str, Any], args: argparse.Namespace) -> str:
    card = f"{args.card if args.memory_gib is None else 'a card'} ({found['card_gib']:g} GiB)"
    peak, micro = found["peak_gib"], found["micro_batch"]
    share = f"{peak:.1f} GiB, {peak / found['card_gib']:.0%} of {card}"
    fits = "none fits: recompute activations (backbone.gradient_checkpointing), or take a larger card"
    if micro:
        batch = f"{found['devices']} GPU(s) = {found['global_batch']} images"
        fits = f"{micro} x accumulate {found['accumulate']} x {batch}"
    lines = [
        *(f"{count / 1e6:>10,.1f} M  parameters of the {name}" for name, count in found["parameters"].items()),
        "",
        f"micro_batch      {fits}",
        f"peak memory      {share}, of it",
        *(f"{gib:>10.2f} GiB  {kind}" for kind, gib in sorted(found["memory_gib"].items(), key=lambda item: -item[1])),
        f"as configured    micro_batch {found['configured_micro_batch']}: {found['configured_peak_gib']:.1f} GiB",
        *saved_by_sharding(found),
        "",
        f"training         {found['tflop_an_image']:.3g} TFLOP an image, {found['tflop_a_step']:,.4g} a step",
        f"steps            {found['steps']:,}, {found['images']:,} images",
        f"time             {found['hours']:,.1f} hours on {found['devices']} GPU(s) at MFU {args.mfu:g}",
        f"cost             {found['gpu_hours']:,.0f} GPU-hours, {found['cost']:,.0f} at {args.price:g} an hour",
    ]
    return "\n".join(lines)


def saved_by_sharding(found: dict[str, Any]) -> list[str]:
    """A line on what FSDP would divide, where the memory above is that of cards which hold all weights."""
    whole, devices = found["trained_gib"], found["devices"]
    if devices == 1 or found["sharded"] or found["stage"] not in ("diffusion", "classifier"):
        return []
    kept = f"leaves {whole / devices:.2f} of {whole:.2f} GiB of trained weights, gradients, optimizer and averages"
    return [f"trainer=fsdp     {kept} on each GPU, beside the blocks that are gathered while they run"]
