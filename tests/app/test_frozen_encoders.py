"""First stages with a frozen encoder through the commands: as their own, and as what latents are aligned with."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from walk import Flow, run_training

from ldmlab.app import cli
from ldmlab.build import load_first_stage
from ldmlab.checkpoints import inventory, load_checkpoint, save_checkpoint
from ldmlab.errors import InputError

RAE = ["first_stage=frozen_f8_small", "first_stage.channels=8", "first_stage.norm_groups=4", "loss=plain_pixel"]
ALIGNED = ["alignment=va_vae", "first_stage.channels=8", "first_stage.norm_groups=4"]


def first_stage(flow: Flow, out: Path, *words: str) -> None:
    run_training("mine/first_stage", *flow.data, f"run.dir={out}", *words)


def clip(flow: Flow, folder: Path) -> list[str]:
    """A copy of the walk's CLIP run."""
    shutil.copytree(flow.root / "clip", folder / "clip")
    return ["encoder=clip", f"encoder.clip.from_run={folder}/clip"]


def tensors(part: Any) -> list[torch.Tensor]:
    """Floating-point tensors of a part of a checkpoint."""
    if isinstance(part, dict):
        return [tensor for value in part.values() for tensor in tensors(value)]
    return [part] if isinstance(part, torch.Tensor) and part.is_floating_point() else []


@pytest.mark.slow
def test_a_frozen_first_stage_needs_no_other_folder(flow: Flow, tmp_path: Path) -> None:
    first_stage(flow, tmp_path / "run", *RAE, *clip(flow, tmp_path), "loss.regularisers.noise=0.8")
    shutil.rmtree(tmp_path / "clip")
    assert cli.dispatch(["export", str(tmp_path / "run"), str(tmp_path / "folder"), "--without-card"]) == 0
    run, folder = (load_first_stage(tmp_path / name).module for name in ("run", "folder"))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    latents = run.encode(images).mean  # type: ignore[operator]
    assert latents.shape == (2, run.latent_channels, 2, 2)
    assert torch.equal(folder.encode(images).mean, latents)  # type: ignore[operator]
    assert torch.equal(folder.decode(latents), run.decode(latents))  # type: ignore[operator]


@pytest.mark.slow
def test_an_aligned_run_resumes_to_the_bit_and_saves_nothing_of_the_encoder(flow: Flow, tmp_path: Path) -> None:
    encoder = clip(flow, tmp_path)
    for name, steps in (("straight", (4,)), ("stopped", (2, 4))):
        for step in steps:
            words = [*ALIGNED, *encoder, f"trainer.max_steps={step}"]
            first_stage(flow, tmp_path / name, *words)
    straight, stopped = (
        load_checkpoint(tmp_path / name / "checkpoints" / "step_00000004.ckpt")["modules"]
        for name in ("straight", "stopped")
    )
    assert straight.keys() == stopped.keys() == {"first_stage", "loss"}
    for name, part in straight.items():
        assert part.keys() == stopped[name].keys()
        assert all(torch.equal(tensor, stopped[name][key]) for key, tensor in part.items())
    assert [name for name in straight["loss"] if "alignment" in name] == ["alignment.projection.weight"]
    for path in (tmp_path / "clip" / "checkpoints").glob("*.ckpt"):  # the same command would read other weights
        other = load_checkpoint(path)
        content = {name: part for name, part in other.items() if name != "inventory"}
        for tensor in tensors(content):
            tensor.mul_(1.1)
        save_checkpoint(path, {**content, "inventory": inventory(content)})
    with pytest.raises(InputError, match="encoder"):
        first_stage(flow, tmp_path / "straight", *ALIGNED, *encoder, "trainer.max_steps=6")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["alignment=va_vae"], "encoder=none, which .*VisionAlignment reads; give encoder"),
        ([*RAE], "encoder=none, which .*RepresentationAutoencoder reads"),
        (["encoder=clip"], "encoder=clip, which no other option reads"),
    ],
)
def test_encoders_and_those_who_read_them(words: list[str], message: str, flow: Flow, tmp_path: Path) -> None:
    given = [f"encoder.clip.from_run={flow.root}/clip"] if "encoder=clip" in words else []
    with pytest.raises(InputError, match=message):
        first_stage(flow, tmp_path, *words, *given)
