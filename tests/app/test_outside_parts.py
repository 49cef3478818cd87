"""Parts of every other kind from a package that lies beside ldmlab: trained from a --config-dir, resumed, sampled.

`test_my_lab.py` shows backbone, conditioner, metric and callback of an installed package.
"""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from ldmlab.app import cli
from refusals import refusal

sys.path.append(str(Path(__file__).parents[1] / "data"))
from shard_maker import write_shards

PACKAGE = "their_lab"
PANELS = "+callbacks.panels={_target_:ldmlab.training.callbacks.panels.Panels,every:100}"  # a sampler is for them
MODULE = '''
"""Parts of another laboratory; no class of ldmlab is inherited from."""

from itertools import pairwise

import torch
from pytorch_lightning.loggers import Logger
from torch import nn

from ldmlab.contracts import Posterior, Reconstruction


class Halves(nn.Module):
    downsampling, latent_channels = 2, 3

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(3, 3, 1)

    def encode(self, images):
        return Posterior(nn.functional.avg_pool2d(images, 2))

    def decode(self, raw_latents):
        return self.out(nn.functional.interpolate(raw_latents, scale_factor=2.0))

    def reconstruct(self, images, noise):
        return Reconstruction(self.decode(self.encode(images).mean), {})

    @property
    def last_layer(self):
        return self.out.weight


class Squared(nn.Module):
    adversary = None

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def autoencoder(self, images, given, last_layer, step):
        error = self.weight * (images - given.images).square().mean()
        return error, {"squared": error.detach()}

    def discriminator(self, images, reconstructed):
        raise NotImplementedError


class Leaps:
    spacing, steps = "linspace", 3

    def __call__(self, denoise, x, grid, *, noise, after_step=None):
        for step, (here, there) in enumerate(pairwise(grid)):
            clean = denoise(x, here).to(x.dtype)
            x = there.alpha * clean + there.sigma * (x - here.alpha * clean) / here.sigma
            x = x if after_step is None else after_step(step, x, clean)
        return x


class Push:
    reads = frozenset()

    def __init__(self, model, weight: float = 1.0) -> None:
        self.weight = weight

    def __call__(self, denoise, batch):
        return lambda x, level: denoise(x, level) + self.weight

    def as_text(self):
        return {"push": self.weight}


class Brightness:
    adds, needs, keeps = frozenset({"class_id"}), frozenset(), None

    def __init__(self, image_size: int, bar: int) -> None:
        self.image_size, self.bar = image_size, bar

    @property
    def held_out(self):
        return self

    def give(self, sample, random):
        return {"class_id": int(sample["image"].mean() > self.bar)}

    def finish(self, images, batch):
        return images.clamp(-0.5, 0.5)


class Momentum:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, parameters):
        return torch.optim.SGD(parameters, lr=self.rate, momentum=0.9)


class HalfEachStep:
    def __call__(self, step):
        return 0.5**step


class Clean:
    def target(self, clean, noise, alpha, sigma):
        return clean

    def clean(self, x, output, level):
        return output.double()


class Straight:
    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.alpha_bar = torch.linspace(0.99, 0.01, steps, dtype=torch.float64)

    def levels(self, t):
        alpha_bar = self.alpha_bar.to(t.device)[t, None, None, None]
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()


class Notes(Logger):
    name, version = "notes", 0

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def log_hyperparams(self, params):
        self._write("open")

    def log_metrics(self, metrics, step):
        self._write(f"step {step} " + " ".join(metrics))

    def finalize(self, status):
        self._write(f"close {status}")

    def _write(self, line):
        with open(self.file, "a") as file:
            file.write(line + chr(10))


class MeanColours(nn.Module):
    name, weights_hash, width, gives = "their-colours", "none", 12, frozenset({"features"})

    def forward(self, images):
        return {"features": nn.functional.adaptive_avg_pool2d(images.float() / 255, 2).flatten(1)}
'''
EPS, LINEAR = "ldmlab.diffusion.parameterization.EpsPrediction", "ldmlab.diffusion.schedule.Schedule"


def diffusion(prediction: dict[str, Any], schedule: dict[str, Any]) -> dict[str, Any]:
    target = "ldmlab.diffusion.latent_diffusion.LatentDiffusion"
    return {"_target_": target, "loss": "l2", "drop_together": False, "prediction": prediction, "schedule": schedule}


def theirs(name: str, **options: Any) -> dict[str, Any]:
    return {"_target_": f"{PACKAGE}.parts.{name}", **options}


FILES = {  # conf/GROUP/theirs.yaml, or another name
    "first_stage/theirs": theirs("Halves"),
    "loss/theirs": theirs("Squared", weight=2.0),
    "sampler/theirs": theirs("Leaps"),
    "guiders/theirs": {"push": theirs("Push", weight=0.5)},
    "task/theirs": theirs("Brightness", bar=100),
    "optimizer/theirs": theirs("Momentum", rate=0.03),
    "lr_schedule/theirs": theirs("HalfEachStep"),
    "diffusion/their_prediction": diffusion(theirs("Clean"), {"_target_": LINEAR}),
    "diffusion/their_schedule": diffusion({"_target_": EPS}, theirs("Straight", steps=20)),
    "features/theirs": theirs("MeanColours"),
}


class Lab:
    """A folder with the package and its conf, images, and the commands."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for split in ("train", "val"):
            write_shards(root / "shards" / split, [4], split=split, size=8)
        (root / "site" / PACKAGE).mkdir(parents=True)
        (root / "site" / PACKAGE / "__init__.py").write_text('__version__ = "0.3"\n')
        (root / "site" / PACKAGE / "parts.py").write_text(MODULE)
        for name, node in FILES.items():
            file = root / "conf" / f"{name}.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(node))

    def train(self, out: Path, steps: int, *more: str) -> list[dict[str, str]]:
        """The rows of its log."""
        data = ["data=shards", f"data.train={self.root}/shards/train", f"data.val={self.root}/shards/val"]
        options = [*data, "data.image_size=8", "data.fields=[]", "data.workers=0", "callbacks=quiet", f"run.dir={out}"]
        options += [
            "trainer.micro_batch=2",
            "trainer.log_every=1",
            "trainer.validate_every=2",
            f"trainer.max_steps={steps}",
        ]
        options += ["trainer.precision=32-true", "trainer.accelerator=cpu", "trainer.checkpoint_every=1"]
        assert cli.dispatch(["train", "--config-dir", str(self.root / "conf"), *options, *more]) == 0
        with open(out / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def train_and_resume(self, out: Path, *more: str, loss: str = "loss") -> list[dict[str, str]]:
        """Two steps, then a third."""
        self.train(out, 2, *more)
        rows = self.train(out, 3, *more)
        assert [row["step"] for row in rows] == ["1", "2", "3"]
        assert all(np.isfinite(float(row[loss])) for row in rows)
        return rows

    def sample(self, model: Path, out: Path, *more: str) -> np.ndarray:
        """Pixels of one image."""
        assert cli.dispatch(["sample", str(model), *more, "--steps", "2", "--device", "cpu", "--out", str(out)]) == 0
        return np.asarray(Image.open(next(out.glob("00000*.png"))))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = Lab(tmp_path_factory.mktemp("lab"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made.root / "site")
        yield made


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    new_process(monkeypatch)


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what was typed, allowed and used, as at the start of a command."""
    monkeypatch.setattr("ldmlab.instantiate._TYPED", set())
    for name in ("_ALLOWED", "_USED"):
        monkeypatch.setattr(f"ldmlab.plugins.{name}", set())


NET = ["backbone.model_channels=32", "backbone.channel_mult=[1]", "backbone.num_res_blocks=1"]
PIXELS = ["first_stage=identity", *NET]
NOTES = "+logger.notes={_target_: their_lab.parts.Notes, file: '%s'}"
KINDS = {  # kind => options of training, words for sampling, and the part of the model folder that names it
    "sampler": (["sampler=theirs", PANELS], ["--sampler", f"{PACKAGE}.parts.Leaps"], "sampler"),
    "task": (["task=theirs", "conditioner=class_label", "conditioner.class_label.classes=2"], ["1"], "task"),
    "prediction": (["diffusion=their_prediction"], [], "diffusion"),
    "schedule": (["diffusion=their_schedule", "stage.panel_steps=4"], [], "diffusion"),
    "optimizer": (["optimizer=theirs"], [], None),
    "lr_schedule": (["lr_schedule=theirs"], [], None),
    "logger": ([NOTES], [], None),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_denoiser_with_a_part_from_outside(
    kind: str, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, typed, named = KINDS[kind]
    options = [option % (tmp_path / "notes.txt") if option is NOTES else option for option in options]
    rows = lab.train_and_resume(tmp_path / "run", *PIXELS, *options)
    check_effect(kind, rows, tmp_path)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["plugins"] == {PACKAGE: "0.3"}
    assert (
        cli.dispatch(["export", "--without-card", str(tmp_path / "run"), str(tmp_path / "model"), "--plugins", PACKAGE])
        == 0
    )
    description = yaml.safe_load((tmp_path / "model" / "model.yaml").read_text())
    assert [name for name, node in description.items() if f"'{PACKAGE}." in str(node)] == ([named] if named else [])
    allowed = ["--plugins", PACKAGE] if named else []
    new_process(monkeypatch)
    pixels = lab.sample(tmp_path / "model", tmp_path / "images", *typed, *allowed)
    assert pixels.shape == (8, 8, 3)
    if kind == "task":  # finish() had the last word
        assert pixels.min() >= 63
        assert pixels.max() <= 192
    if named and kind != "sampler":  # the one that samples is typed, and so trusted
        new_process(monkeypatch)
        words = ["sample", str(tmp_path / "model"), *typed, "--device", "cpu", "--out", str(tmp_path / "never")]
        refused(words)
        assert not (tmp_path / "never").exists()


def check_effect(kind: str, rows: list[dict[str, str]], folder: Path) -> None:
    """What shows that the part was used, in this and no other place."""
    rates = [float(row["learning_rate/denoiser"]) for row in rows]
    if kind == "optimizer":
        assert rates == [0.03] * 3
    if kind == "lr_schedule":
        assert rates == pytest.approx([1e-4, 0.5e-4, 0.25e-4])
    if kind == "logger":
        lines = (folder / "notes.txt").read_text().splitlines()
        ends = [line for line, _ in groupby(line for line in lines if not line.startswith("step"))]
        assert ends == 2 * ["open", "close success"]
        steps = [line.split()[1] for line in lines if line.startswith("step") and " loss" in line]
        assert steps == ["1", "2", "3"]


def refused(words: list[str]) -> None:
    sentence = refusal(lambda: cli.dispatch(words))
    assert f"{PACKAGE}.parts." in sentence
    assert f"--plugins {PACKAGE}" in sentence


@pytest.mark.slow
def test_a_first_stage_and_a_loss_from_outside(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = ["stage=autoencoder", "first_stage=theirs", "loss=theirs"]
    lab.train_and_resume(tmp_path / "first_stage", *stage, loss="squared")
    new_process(monkeypatch)
    words = [*NET, f"from_run={tmp_path}/first_stage"]
    data = ["data=shards", f"data.train={lab.root}/shards/train", f"data.val={lab.root}/shards/val"]
    refused(["train", *words, *data, "data.image_size=8", f"run.dir={tmp_path}/never"])
    assert not (tmp_path / "never").exists()
    lab.train_and_resume(tmp_path / "run", *words, f"plugins=[{PACKAGE}]")
    assert (
        cli.dispatch(["export", "--without-card", str(tmp_path / "run"), str(tmp_path / "model"), "--plugins", PACKAGE])
        == 0
    )
    assert lab.sample(tmp_path / "model", tmp_path / "images", "--plugins", PACKAGE).shape == (8, 8, 3)
    new_process(monkeypatch)
    refused(["sample", str(tmp_path / "model"), "--out", str(tmp_path / "never")])


@pytest.mark.slow
def test_a_guider_and_features_from_outside(lab: Lab, tmp_path: Path) -> None:
    lab.train(tmp_path / "run", 2, *PIXELS)
    plain = lab.sample(tmp_path / "run", tmp_path / "plain")
    push = ["--guider", f"{PACKAGE}.parts.Push", "--guider-weight", "0.5"]
    pushed = lab.sample(tmp_path / "run", tmp_path / "pushed", *push)
    assert pushed.astype(int).sum() > plain.astype(int).sum()
    few = ["protocol.samples=4", "protocol.steps=2", "protocol.neighbours=0", "~protocol.metrics.precision_recall"]
    words = [f"model={tmp_path}/run", "features=theirs", "guiders=theirs", *few, "device=cpu", "keep_reference=false"]
    evaluate = ["evaluate", "--config-dir", str(lab.root / "conf"), *words, f"out={tmp_path}/scores"]
    assert cli.dispatch(evaluate) == 0
    record = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert "their-colours" in json.dumps(record)
    assert '"push": 0.5' in json.dumps(record)
