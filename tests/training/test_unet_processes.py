"""The real denoiser over two processes, with and without recomputed activations, told by tokens or by a vector."""

from pathlib import Path

import forked
import pytest
import torch
from toy_stages import options, train

from ldmlab.backbones.unet import UNet
from ldmlab.checkpoints import load_checkpoint
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.first_stages.identity import Identity
from ldmlab.nn import compiling
from ldmlab.samplers.ddim import Ddim
from ldmlab.training.diffusion_module import DiffusionStage


def descent(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Plain descent: the weights' change is the gradient."""
    return torch.optim.SGD(parameters, lr=0.05)


def stage(slot: str, recompute: bool) -> DiffusionStage:
    torch.manual_seed(0)
    told = {"context_width": 6} if slot == "tokens" else {"vector_width": 6}
    unet = UNet(3, 3, 32, [1, 2], 1, [2], heads=2, gradient_checkpointing=recompute, **told)
    with torch.no_grad():
        for parameter in unet.parameters():  # the official last layers start at zero and would hide everything
            parameter.add_(0.02 * torch.randn_like(parameter))
    model = LatentDiffusion(
        Identity(),
        LatentScale(1.0),
        unet,
        {"class": ClassEmbedder(4, 6, drop=0.2, slot=slot)},
        Schedule("scaled_linear"),
        EpsPrediction(),
        guidance_trained=True,
    )
    changes = {"max_steps": 2, "optimizer": descent, "gradient_clip": None}
    return DiffusionStage(diffusion=model, sampler=Ddim(), grid=ddim_grid(model.schedule, 4), **options(**changes))


def member(rank: int, world: int, folder: Path, slot: str, compiled: bool) -> None:
    compiling.BACKEND = "eager"  # its graphs without the compiler
    train(stage(slot, recompute=True), folder, 2, world, rank, validate_every=100, compile=compiled)


@pytest.mark.slow
@pytest.mark.parametrize(("slot", "compiled"), [("tokens", False), ("vector", False), ("tokens", True)])
def test_two_processes_and_recomputed_activations_change_nothing(slot: str, compiled: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, member, tmp_path / "two", slot, compiled, log=log)) == [0, 0], log.read_text()
    train(stage(slot, False), tmp_path / "one", 4, validate_every=100)
    one, two = (load_checkpoint(tmp_path / n / "checkpoints" / "step_00000002.ckpt")["modules"] for n in ("one", "two"))
    for name in one:
        for key, value in one[name].items():
            torch.testing.assert_close(value, two[name][key], rtol=0, atol=1e-5)
