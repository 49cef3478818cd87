"""Runs with an alignment: what they leave of it, resuming, and the denoiser without the term."""

from pathlib import Path
from typing import Any

import torch
from toy_stages import options, toy_alignment, train

from ldmlab.backbones.dit import DiT
from ldmlab.checkpoints import load_checkpoint
from ldmlab.conditioners.class_label import ClassEmbedder
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule
from ldmlab.first_stages.identity import Identity
from ldmlab.samplers.ddim import Ddim
from ldmlab.training.diffusion_module import DiffusionStage


def stage(until_step: int | None, aligned: bool = True, steps: int = 4, **changes: Any) -> DiffusionStage:
    torch.manual_seed(0)
    network = DiT(3, 3, 16, 2, heads=2, context_width=4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    told = {"class": ClassEmbedder(4, 4, drop=0.2)}
    path = Schedule("scaled_linear")
    model = LatentDiffusion(Identity(), LatentScale(1.0), network, told, path, EpsPrediction(), guidance_trained=True)
    alignment = toy_alignment(network, until_step=until_step) if aligned else None
    given = options(max_steps=steps, gradient_clip=None, **changes)
    grid = model.path.grid(2, "auto")
    return DiffusionStage(diffusion=model, sampler=Ddim(), grid=grid, alignment=alignment, **given)


def run(folder: Path, made: DiffusionStage, steps: int = 4) -> dict[str, Any]:
    train(made, folder, validate_every=100, checkpoint_every=2)
    return load_checkpoint(folder / "checkpoints" / f"step_{steps:08d}.ckpt")


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_term_that_has_ended_changes_no_bit_of_the_denoiser(tmp_path: Path) -> None:
    over = stage(1)
    over.alignment.until_step = 0  # before the first step, which no option can say
    plain, ended = run(tmp_path / "plain", stage(None, aligned=False)), run(tmp_path / "ended", over)
    assert same(plain["modules"]["denoiser"], ended["modules"]["denoiser"])
    assert same(plain["averaged"]["denoiser"]["weights"], ended["averaged"]["denoiser"]["weights"])
    aligned = run(tmp_path / "aligned", stage(None))
    assert not same(plain["modules"]["denoiser"], aligned["modules"]["denoiser"])
    assert aligned["modules"].keys() - plain["modules"].keys() == {"projectors"}
    assert aligned["averaged"].keys() == {"denoiser"}
    lines = (tmp_path / "aligned" / "metrics.csv").read_text().splitlines()
    assert "alignment" in lines[0].split(",")


def test_a_resumed_run_is_the_same(tmp_path: Path) -> None:
    """Stopped while the term is there; it ends later."""
    whole = run(tmp_path / "whole", stage(3))
    first = run(tmp_path / "parts", stage(3, steps=2), steps=2)
    assert first["step"] == 2
    parts = run(tmp_path / "parts", stage(3))
    for name in ("denoiser", "projectors"):
        assert same(whole["modules"][name], parts["modules"][name])
    assert not same(first["modules"]["projectors"], parts["modules"]["projectors"])
