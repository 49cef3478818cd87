"""A small real model that samples in a blink, and `ldmlab sample` on it; weights are drawn, none is zero."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ldmlab.backbones.unet import UNet
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.conditioners.image_embedding import open_clip_image
from ldmlab.conditioners.text import open_clip_text
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.inference.model import LoadedModel

CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


def tiny_model(told: str | None = "class_id", **options: Any) -> LoadedModel:
    """told: class_id | caption | reference | None."""
    torch.manual_seed(1)
    conditioners: dict[str, nn.Module] = {}
    if told == "class_id":
        conditioners["class_label"] = ClassEmbedder(10, width=16)
    elif told == "caption":
        conditioners["text"] = open_clip_text(config=CLIP)
    elif told == "reference":
        conditioners["image"] = open_clip_image(config=CLIP)
    unet = UNet(
        in_channels=2,
        out_channels=2,
        model_channels=32,
        channel_mult=[1, 2],
        num_res_blocks=1,
        attention_downsampling=[2],
        heads=2,
        context_width=16 if told else None,
    )
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    stage = KLAutoencoder(channel_mult=[1, 2], latent_channels=2, channels=8, num_res_blocks=1, norm_groups=4)
    diffusion = LatentDiffusion(
        stage, LatentScale(1.0), unet, conditioners, Schedule(), EpsPrediction(),
        **{"guidance_trained": bool(told), **options},
    )  # fmt: skip
    info = {"path": "runs/tiny", "fingerprint": "0123456789abcdef", "weights": "averaged", "step": 7}
    return LoadedModel(diffusion, image_size=16, info=info)


def sample_command(words: list[str], told: str | None = "class_id") -> None:
    """`ldmlab sample` with the tiny model in place of the one on disk."""
    from ldmlab import build
    from ldmlab.app.cli import Parser
    from ldmlab.app.commands import sample

    def load(path: Path, weights: str = "averaged", device: str = "auto") -> LoadedModel:
        return tiny_model(told)

    original, build.load = build.load, load  # type: ignore[assignment]
    try:
        parser = Parser()
        sample.add_arguments(parser)
        sample.run(parser.parse_intermixed_args(words))
    finally:
        build.load = original


def sample_as_rank(launcher: str, rank: int, world: int, port: int, words: list[str]) -> None:
    """One process of a torchrun or an srun."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = {
        "torchrun": {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank},
        "srun": {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": world, "SLURM_LOCALID": rank, "SLURM_JOB_ID": 7},
    }
    os.environ.update(address | {name: str(number) for name, number in numbers[launcher].items()})
    sys.stdin = open(os.devnull)  # noqa: SIM115  a shell's tasks have a terminal
    sample_command(words)
