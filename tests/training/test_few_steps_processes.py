"""Models of few steps over two processes, with recomputed activations and compiled networks, equal one process."""

import copy
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from test_unet_processes import descent
from toy_stages import options, train

from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import load_checkpoint
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.diffusion.consistency_distillation import Consistency
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.mean_flow_objective import MeanFlow
from ldmlab.diffusion.parameterization import VelocityPrediction
from ldmlab.diffusion.paths import LinearPath
from ldmlab.first_stages.identity import Identity
from ldmlab.nn import compiling
from ldmlab.samplers._auto import Auto
from ldmlab.training.diffusion_module import DiffusionStage


def stage(kind: str, recompute: bool) -> DiffusionStage:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"context_width": 6, "gradient_checkpointing": recompute, "heads": 2}
    unet = UNet(3, 3, 32, [1, 2], 1, [2], numbers=2 if kind == "mean_flow" else 1, **sizes)
    with torch.no_grad():
        for parameter in unet.parameters():  # the last layers start at zero and would hide everything
            parameter.add_(0.02 * torch.randn_like(parameter))
    known: dict[str, Any] = {
        "first_stage": Identity(),
        "latent_scale": LatentScale(1.0),
        "conditioners": {"class": ClassEmbedder(4, 6, drop=0.2)},
        "schedule": LinearPath(0.0, 1.0),
        "prediction": VelocityPrediction(),
    }
    model: MeanFlow | Consistency
    if kind == "mean_flow":
        model = MeanFlow(backbone=unet, **known, guidance=(1.0, 4.0), kappa=0.5, power=0.5)
    else:
        model = Consistency(backbone=unet, **known, guidance=(1.0, 4.0), levels=8, loss="l2", target_decay=0.5)
        plain = UNet(3, 3, 32, [1, 2], 1, [2], **sizes)
        plain.load_state_dict({k: v for k, v in copy.deepcopy(unet.state_dict()).items() if k[:8] != "numbers."})
        model.conditioners.requires_grad_(False)
        model.distil(LatentDiffusion(backbone=plain, **known, guidance_trained=True), 192)
    changes = {"max_steps": 2, "optimizer": descent, "gradient_clip": None}
    return DiffusionStage(diffusion=model, sampler=Auto(), grid=model.path.grid(1), **options(**changes))


def member(rank: int, world: int, folder: Path, kind: str, strategy: str) -> None:
    compiling.BACKEND = "eager"  # its graphs without the compiler
    made = stage(kind, recompute=strategy == "ddp")
    train(made, folder, 2, world, rank, validate_every=100, compile=strategy == "ddp", strategy=strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("kind", ["mean_flow", "consistency"])
def test_two_processes_equal_one(kind: str, strategy: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    group = forked.group(2, member, tmp_path / "two", kind, strategy, log=log)
    assert forked.finish(*group, seconds=280) == [0, 0], log.read_text()
    train(stage(kind, False), tmp_path / "one", 4, validate_every=100)
    one, two = (load_checkpoint(tmp_path / n / "checkpoints" / "step_00000002.ckpt")["modules"] for n in ("one", "two"))
    assert ("target" in one) == (kind == "consistency")
    for name in one:
        for key, value in one[name].items():  # sums of four images in another order, a few units of float32
            torch.testing.assert_close(value, two[name][key], rtol=0, atol=1e-5)
