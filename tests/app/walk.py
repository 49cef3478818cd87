"""The README's steps on a stranger's folder, at sizes that take seconds."""

from dataclasses import dataclass
from pathlib import Path

from strange_images import make_folder

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.wiring import train

STEPS = ["trainer.max_steps=2", "trainer.validate_every=2", "trainer.checkpoint_every=1", "trainer.log_every=1"]
SMALL = [*STEPS, "trainer.micro_batch=8", "trainer.precision=32-true", "logger=csv", "data.workers=0"]
TINY_STAGE = ["first_stage.channels=16", "first_stage.norm_groups=8"]
TINY_CLIP = ["clip.config.vision_cfg.layers=1", "clip.config.text_cfg.layers=1"]
TINY_UNET = ["backbone.model_channels=32", "backbone.channel_mult=[1,2]", "stage.panel_steps=2", "stage.panel_count=4"]


@dataclass(frozen=True)
class Flow:
    """The folders of one walk through the flow."""

    root: Path

    @property
    def images(self) -> Path:
        """The stranger's folder."""
        return self.root / "images"

    @property
    def packed(self) -> Path:
        """Its image shards."""
        return self.root / "packed"

    @property
    def data(self) -> list[str]:
        """The packed images as options."""
        return [f"data.train={self.root}/packed/train", f"data.val={self.root}/packed/val", "data.image_size=16"]

    def first_stage(self, *more: str, out: str = "first_stage") -> None:
        """Step 2a."""
        run_training("mine/first_stage", *self.data, *TINY_STAGE, f"run.dir={self.root}/{out}", *more)

    def clip(self, *more: str, out: str = "clip") -> None:
        """Step 2b."""
        run_training("mine/clip", *self.data, *TINY_CLIP, f"run.dir={self.root}/{out}", *more)

    def encode(self, *more: str, out: str = "latents") -> None:
        """Step 3."""
        options = [*self.data[:2], f"from_run={self.root}/first_stage", f"out={self.root}/{out}", "data.workers=0"]
        assert cli.dispatch(["encode", "data=shards", *options, *more]) == 0

    def denoiser(self, *more: str, out: str = "model") -> None:
        """Step 4."""
        given = [f"data.latents={self.root}/latents", f"conditioner.text.from_run={self.root}/clip"]
        run_training("mine/text_to_image", *self.data, *given, *TINY_UNET, f"run.dir={self.root}/{out}", *more)


def run_training(experiment: str, *options: str) -> None:
    """`python train.py`, in this process."""
    train(plain(compose("train", [f"experiment={experiment}", *SMALL, *options])))


def walk(root: Path) -> Flow:
    """Packed images, first stage, CLIP, latents and a denoiser."""
    made = Flow(root)
    make_folder(made.images)
    options = ["--size", "32", "--val", "0.2", "--stratify", "kind", "--workers", "1", "--max-bad", "0.1"]
    assert cli.dispatch(["pack", str(made.images), str(made.packed), *options]) == 0
    made.first_stage()
    made.clip()
    made.encode()
    made.denoiser()
    return made
