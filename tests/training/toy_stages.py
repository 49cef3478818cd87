"""Tiny stages and data for the tests of the training room."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ldmlab.contracts import Conditioning
from ldmlab.diffusion.alignment import Alignment
from ldmlab.diffusion.latent_diffusion import LatentDiffusion
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.diffusion.parameterization import EpsPrediction
from ldmlab.diffusion.schedule import Schedule, ddim_grid
from ldmlab.encoders import FrozenEncoder
from ldmlab.first_stages.identity import Identity
from ldmlab.first_stages.kl import KLAutoencoder
from ldmlab.losses.adversary import Adversary
from ldmlab.losses.autoencoder_loss import AutoencoderLoss
from ldmlab.losses.patch_discriminator import PatchDiscriminator
from ldmlab.randomness import normal
from ldmlab.samplers.ddim import Ddim
from ldmlab.training.autoencoder_module import AutoencoderStage
from ldmlab.training.data_module import Batches
from ldmlab.training.diffusion_module import DiffusionStage
from ldmlab.training.fit import fit
from ldmlab.training.optim import AdamW, Cosine
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.stage import Losses, Stage

IMAGES = 50


class ToyBackbone(nn.Module):
    """Two convolutions that are told the time and a class vector, and `layers` matrices between them."""

    accepts = frozenset({"vector"})

    def __init__(self, channels: int = 3, width: int = 8, dropout: float = 0.0, layers: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.told = nn.Linear(5, width)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return conditioning

    def forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        told = torch.cat([t[:, None] / 1000, conditioning.vector], dim=1)  # (B, 5)
        h = torch.tanh(self.first(x) + self.told(told)[:, :, None, None])  # (B, width, h, w)
        for block in self.blocks:
            h = h + torch.tanh(block(h.movedim(1, -1)).movedim(-1, 1))
        return self.last(self.dropout(h))


class ToyClass(nn.Module):
    """Four classes and a null row."""

    reads = frozenset({"class_id"})
    slot = "vector"

    def __init__(self, drop: float = 0.2) -> None:
        super().__init__()
        self.drop = drop
        self.rows = nn.Embedding(5, 4)

    def forward(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return self.rows(batch["class_id"])

    def null(self, batch: dict[str, Any], encode: Any) -> Tensor:
        return self.rows(torch.full_like(batch["class_id"], 4))


class ToyEncoder(FrozenEncoder):
    """Patches of 2 x 2 pixels."""

    name, width = "toy", 5

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, self.width, 2, 2)
        self.train(False)

    def maps(self, images: Tensor) -> Tensor:
        return self.conv(images)


def toy_alignment(backbone: nn.Module, **changes: Any) -> Alignment:
    """With the toy encoder's features, of 8 x 8 latents; the term ends in the middle of four steps."""
    alignment = Alignment(backbone, {"toy": 5}, (8, 8), **{"hidden": 16, "until_step": 2, **changes})
    encoder: Any = ToyEncoder()
    alignment.run({"toy": encoder})
    return alignment


def options(**changes: Any) -> dict[str, Any]:
    """Stage options that every toy takes."""
    base = {"seed": 3, "max_steps": 12, "optimizer": AdamW(1e-3), "lr_schedule": Cosine(12, warmup_steps=2)}
    return {**base, "averaging_decay": 0.99, "gradient_clip": 1.0, **changes}


def diffusion_stage(dropout: float = 0.0, layers: int = 0, **changes: Any) -> DiffusionStage:
    """A diffusion stage on 8 x 8 pixels."""
    torch.manual_seed(0)
    schedule = Schedule("scaled_linear", steps=100)
    model = LatentDiffusion(
        Identity(), LatentScale(1.0), ToyBackbone(dropout=dropout, layers=layers), {"class": ToyClass()}, schedule,
        EpsPrediction(), guidance_trained=True,
    )  # fmt: skip
    return DiffusionStage(
        diffusion=model, sampler=Ddim(), grid=ddim_grid(schedule, 4), panel_count=4, **options(**changes)
    )


def autoencoder(**changes: Any) -> AutoencoderStage:
    """The real first stage with its adversary, which starts in the middle of the run."""
    torch.manual_seed(2)
    first_stage = KLAutoencoder(channels=8, channel_mult=[1, 1], num_res_blocks=1, latent_channels=2, norm_groups=4)
    critic = Adversary(
        discriminator=PatchDiscriminator(8, layers=1), weight=0.5, discriminator_start=3, adversary_start=5
    )
    loss = AutoencoderLoss(penalty_weights={"kl": 1e-6}, lpips_weight=0.0, reduction="mean", adversary=critic)
    return AutoencoderStage(first_stage=first_stage, loss=loss, **options(accumulate=2, **changes))


class TwoGroups(Stage):
    """A toy with a main group and an opponent that joins at step 3."""

    kind: ClassVar[str] = "toy"
    averaged: ClassVar[str | None] = "main"
    monitor = "error"

    def __init__(self, **changes: Any) -> None:
        super().__init__(**options(**changes))
        torch.manual_seed(1)
        self.main, self.opponent = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 1, 3)
        self.updates = {"main": 0, "opponent": 0}

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"main": list(self.main.parameters()), "opponent": list(self.opponent.parameters())}

    def active(self, group: str) -> bool:
        return group == "main" or self.step >= 3

    def saved(self) -> dict[str, nn.Module]:
        return {"main": self.main, "adversary": self.opponent}

    def losses(self, group: str, batch: dict[str, Any]) -> Losses:
        self.updates[group] += 1
        x = batch["image"].float() / 127.5 - 1
        if group == "main":
            self._made = self.main(x)
            error = (self._made - x).square().mean()
            return Losses(error + 0.1 * self.opponent(self._made).mean(), {"error": error})
        total = self.opponent(x).mean() - self.opponent(self._made.detach()).mean()
        return Losses(total + self.opponent.weight.square().sum(), {"opponent": total})

    def on_validation_epoch_start(self) -> None:
        self._total, self._count = torch.zeros(()), 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        x = batch["image"].float() / 127.5 - 1
        self._total = self._total + (self.main(x).float() - x).square().mean(dim=(1, 2, 3)).sum()
        self._count += len(x)

    def validation_metrics(self) -> dict[str, float]:
        return self.mean_over_processes({"error": self._total}, self._count)

    def panels(self, batches: Any) -> dict[str, Tensor]:
        return {"input": next(iter(batches))["image"].permute(0, 2, 3, 1)}


def image_batch(positions: range) -> dict[str, Any]:
    """The images at these positions: a function of the position only_trainable, 8 x 8 pixels."""
    index = torch.tensor([p % IMAGES for p in positions])
    image = (normal(0, "toy", index, (3, 8, 8)) * 40 + 127).clamp(0, 255).byte()
    return {
        "key": [f"{p % IMAGES:03d}" for p in positions],
        "position": torch.tensor(list(positions)),
        "skipped": [],
        "image": image,
        "class_id": index % 4,
    }


def unreadable_batch() -> dict[str, Any]:
    """Of which no image could be read."""
    return {name: value[:0] for name, value in image_batch(range(1)).items()}


def endless(position: int, micro: int, accumulate: int = 1, world: int = 1, rank: int = 0) -> Iterator[dict[str, Any]]:
    """Micro-batches of one process: a contiguous slice of every global batch, split contiguously."""
    share = micro * accumulate
    while True:
        start = position + rank * share
        for index in range(accumulate):
            yield image_batch(range(start + index * micro, start + (index + 1) * micro))
        position += share * world


class Keys(pl.Callback):
    """Appends the keys of every micro-batch to a file, and may pause to be killed or raise a signal."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with open(self.path, "a") as file:
            file.write(f"{pl_module.position} {' '.join(batch['key'])}\n")


def settings(**changes: Any) -> TrainerSettings:
    base = {"max_steps": 12, "micro_batch": 4, "precision": "32-true", "log_every": 4, "validate_every": 6}
    return TrainerSettings(**{**base, "checkpoint_every": 3, "accelerator": "cpu", **changes})


def train(
    stage: Stage,
    folder: Path,
    micro: int = 4,
    world: int = 1,
    rank: int = 0,
    callbacks: Any = (),
    val: Any = None,  # this process's batches, for 4 images of its own
    **changes: Any,
) -> Path:
    """Fit a toy in a run folder."""
    random.seed(5)
    run = RunFolder.at(folder)
    try:
        return fit(
            stage,
            Batches(
                lambda position: endless(position, micro, stage.accumulate, world, rank),
                val or (lambda: [image_batch(range(4 * rank, 4 * rank + 4))]),
                manifest_hash="abc",
            ),
            run=run,
            settings=settings(micro_batch=micro, accumulate=stage.accumulate, max_steps=stage.max_steps, **changes),
            callbacks=callbacks,
            resume_command="python train.py run.dir=here",
        )
    finally:
        run.close()
