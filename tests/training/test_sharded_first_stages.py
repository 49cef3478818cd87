"""Sharded first stages against one process: weights, norms and averages, the adversary's weights too, and resuming."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from test_regularised_first_stage import EVERYTHING, Averages
from test_sharding import close
from torch import nn
from torch.distributed.tensor import DTensor
from toy_stages import image_batch, options, train, unreadable_batch

from ldmlab.checkpoints import load_checkpoint
from ldmlab.first_stages.deep_compression import DeepCompressionAutoencoder
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.first_stages.vq import VQModel
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.latent_regularisers import LatentRegularisers
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.losses.vision_alignment import VisionAlignment
from ldmlab.nn import compiling
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.callbacks.panels import Panels
from ldmlab.training.optim import AdamW

_SIZES: dict[str, Any] = {"channels": 8, "channel_mult": [1, 2], "num_res_blocks": 1, "norm_groups": 4}


def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Momentum that does not divide by small gradients, whose rounding would show."""
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


def stage(kind: str, official_order: bool = False, adaptive: bool = True, **changes: Any) -> AutoencoderStage:
    """A first stage with an adversary that joins in the middle, and by `kind` what else is read from its weights."""
    torch.manual_seed(2)
    network: Any
    if kind == "vq":  # codes that are running means and restart
        network = VQModel(**_SIZES, latent_channels=2, codebook_size=8, codebook_decay=0.9, restart_below=0.3)
    elif kind == "deep":
        sides: dict[str, Any] = {
            "block_out_channels": [8, 16],
            "layers_per_block": [1, 1],
            "qkv_multiscales": [[], [3]],
        }
        sides["block_types"] = ["ResBlock", "EfficientViTBlock"]
        node: dict[str, Any] = {
            f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in sides.items()
        }
        network = DeepCompressionAutoencoder(**node, latent_channels=4, attention_head_dim=8)
    else:
        network = KLAutoencoder(**_SIZES, latent_channels=2, attention_downsampling=[2])
    critic = Adversary(
        discriminator=PatchDiscriminator(8, layers=1, norm="group"), weight=0.5, discriminator_start=1,
        adversary_start=2, official_order=official_order, adaptive=adaptive,
    )  # fmt: skip
    penalties = {"vq": {"codebook": 1.0}, "deep": {}}.get(kind, {"kl": 1e-2})
    spread: Any = "learned" if kind == "aligned" else "fixed"
    loss = AutoencoderLoss(
        penalty_weights=penalties, lpips_weight=0.0, reduction="mean", adversary=critic, logvar=spread
    )
    if kind == "aligned":
        encoder: Any = Averages()
        loss.regularisers = LatentRegularisers(**EVERYTHING)
        loss.alignment = VisionAlignment(
            encoder=encoder, latent_channels=2, cosine_margin=0.0, distance_margin=0.0, adaptive=adaptive
        )
    given = {"optimizer": descent, "gradient_clip": 0.5, "averaging_decay": 0.9, **changes}
    return AutoencoderStage(first_stage=network, loss=loss, **options(**given))


class Parts(pl.Callback):
    """That no process holds more than its part of what is sharded."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        parameters = [*pl_module.first_stage.parameters()]
        whole = {id(parameter) for parameter in pl_module.whole()}
        assert all(isinstance(p, DTensor) != (id(p) in whole) for p in parameters)
        assert len(whole) < 0.2 * len(parameters)


def member(rank: int, world: int, folder: Path, make: Callable[[], Any], strategy: str, changes: Any) -> None:
    compiling.BACKEND = "eager"  # its graphs without the compiler

    def val() -> list[dict[str, Any]]:  # unequally many, some processes have none, and of some no image can be read
        unreadable = [unreadable_batch()]
        return unreadable + [image_batch(range(4 * i, 4 * i + 4)) for i in range(rank, 3, world)] + unreadable * rank

    watched: list[Any] = [Panels(every=100), *([Parts()] if strategy in ("fsdp", "hsdp") and world > 1 else [])]
    train(make(), folder, 8 // world, world, rank, watched, val, strategy=strategy, validate_every=2, **changes)


def run(folder: Path, make: Callable[[], Any], world: int, strategy: str, **changes: Any) -> Any:
    """The last checkpoint's content."""
    if world == 1:
        member(0, 1, folder, make, strategy, changes)
    else:
        log = folder.with_suffix(".log")
        codes = forked.finish(*forked.group(world, member, folder, make, strategy, changes, log=log))
        assert codes == [0] * world, log.read_text()
    return load_checkpoint(max((folder / "checkpoints").glob("step_*.ckpt")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "world", "strategy", "accumulate", "changes"),
    [
        ("kl", 2, "fsdp", 1, {}),
        ("kl", 4, "hsdp", 1, {"official_order": True}),
        ("kl", 4, "hsdp", 3, {}),
        ("vq", 2, "fsdp", 1, {}),
        ("vq", 2, "fsdp", 3, {}),
        ("deep", 2, "fsdp", 1, {"compile": True}),
        ("aligned", 4, "fsdp", 1, {}),
        ("aligned", 2, "fsdp", 3, {"compile": True}),
    ],
)
def test_processes_train_as_one(
    kind: str, world: int, strategy: str, accumulate: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    order = changes.pop("official_order", False)
    adaptive = accumulate == 1  # weights are those of a micro-batch, whose images depend on the number of processes
    make = partial(stage, kind, order, adaptive, accumulate=accumulate, max_steps=6)
    one = run(tmp_path / "one", make, 1, "auto", precision="64-true")
    many = run(tmp_path / "many", make, world, strategy, precision="64-true", **changes)
    for part in ("modules", "averaged"):
        close(one[part], many[part])
    for group in ("generator", "discriminator"):
        close(one["optimizers"][group]["state"], many["optimizers"][group]["state"])
    assert one["notes"]["val"]["psnr"] == pytest.approx(many["notes"]["val"]["psnr"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vq", "aligned"])
def test_a_resumed_run_is_the_same_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """With AdamW, whose kernels for many parameters take no mixture of sharded and whole ones."""
    make = partial(stage, kind, optimizer=AdamW(1e-3), max_steps=4)
    whole = run(tmp_path / "whole", make, 2, "fsdp", checkpoint_every=2)
    step = "checkpoints/step_00000002.ckpt"
    shutil.copytree(tmp_path / "whole" / step, tmp_path / "again" / step)
    again = run(tmp_path / "again", make, 2, "fsdp", checkpoint_every=2)
    for part in ("modules", "averaged", "optimizers", "rng"):
        forked.same(whole[part], again[part], part)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", partial(stage, "kl", max_steps=6), 1, "auto")
    for steps, world in ((2, 4), (4, 2), (6, 1)):
        strategy = "fsdp" if world > 1 else "auto"
        last = run(tmp_path / "parts", partial(stage, "kl", max_steps=steps), world, strategy)
    close(straight["modules"], last["modules"], 2e-5)


def test_parameters_of_both_kinds_are_whole_in_one_process() -> None:
    made = stage("vq")
    names = {id(p): n for n, p in made.first_stage.named_parameters()}
    found = sorted(names[id(parameter)] for parameter in made.whole())
    assert found == ["decoder.output.weight", "encoder.output.weight", "quantiser.codebook.weight"]
