"""From packed images to a classifier run and samples guided by it, and what is refused on the way."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ldmlab
from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.guiders import build_guiders
from ldmlab.app.wiring import train
from ldmlab.build import load_classifier
from ldmlab.inference.grids import read_settings
from refusals import refusal

SMALL = ["trainer.max_steps=3", "trainer.validate_every=3", "trainer.checkpoint_every=3", "trainer.log_every=1"]
SMALL += ["trainer.micro_batch=8", "trainer.precision=32-true", "data.workers=0", "first_stage=identity"]
SMALL += ["data=shards", "data.image_size=16", "data.fields=[class_id]"]
TINY_CLASSIFIER = ["classifier.classes=2", "classifier.model_channels=32", "classifier.channel_mult=[1,2]"]
TINY_UNET = ["backbone.model_channels=32", "backbone.channel_mult=[1,2]", "stage.panel_steps=2", "stage.panel_count=2"]


@dataclass(frozen=True)
class Runs:
    """The folders that the tests share."""

    root: Path

    def train(self, out: str, *options: str) -> Path:
        """`python train.py` into a folder of its own."""
        data = [f"data.train={self.root}/packed/train", f"data.val={self.root}/packed/val"]
        train(plain(compose("train", [*SMALL, *data, f"run.dir={self.root / out}", *options])))
        return self.root / out

    def sample(self, out: Path, *words: str, model: str = "denoiser") -> None:
        """`ldmlab sample`."""
        options = ["--steps", "4", "--device", "cpu", "--out", str(out)]
        assert cli.dispatch(["sample", str(self.root / model), *words, *options]) == 0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Red and blue images, a denoiser that is told nothing, and a classifier of what it denoises."""
    made = Runs(tmp_path_factory.mktemp("guidance"))
    for number in range(24):
        name, colour = ("blue", (30, 40, 200)) if number % 2 else ("red", (200, 40, 30))
        folder = made.root / "images" / name
        folder.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(-20, 20, (16, 16, 3))
        Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    words = [str(made.root / "images"), str(made.root / "packed"), "--size", "16", "--val", "0.3", "--workers", "1"]
    assert cli.dispatch(["pack", *words]) == 0
    made.train("denoiser", "stage=diffusion", "conditioner=none", *TINY_UNET)
    made.train(
        "classifier", "stage=classifier", *TINY_CLASSIFIER, "trainer.max_steps=20", "optimizer.learning_rate=1e-3"
    )
    return made


def images(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)).astype(float) for path in sorted(folder.glob("0*.png"))])


def test_samples_of_a_model_that_is_told_nothing_follow_the_classes(runs: Runs, tmp_path: Path) -> None:
    classifier = str(runs.root / "classifier")
    runs.sample(tmp_path / "guided", "0", "1", "--classifier", classifier, "--classifier-scale", "30")
    runs.sample(tmp_path / "swapped", "1", "0", "--classifier", classifier, "--classifier-scale", "30")
    told = read_settings(tmp_path / "guided" / "000001.png")
    assert {"class_id": "1", "classifier": classifier, "classifier_scale": "30.0", "guidance_scale": "1.0"}.items() <= (
        told.items()
    )
    guided, swapped = images(tmp_path / "guided"), images(tmp_path / "swapped")
    redness = [(p[..., 0] - p[..., 2]).mean(axis=(1, 2)) for p in (guided, swapped)]  # class 0 is blue, 1 is red
    assert redness[1][0] > redness[0][0]
    assert redness[0][1] > redness[1][1]


def test_the_run_logs_its_accuracy_by_noise_level(runs: Runs) -> None:
    text = (runs.root / "classifier" / "metrics.csv").read_text()
    for name in ("val/accuracy", "val/accuracy_by_noise/0.00", "accuracy", "loss_by_noise/"):
        assert name in text.splitlines()[0]
    assert list((runs.root / "classifier" / "checkpoints").glob("best_step_*_accuracy_*.ckpt"))


def test_samples_are_pulled_to_a_image(runs: Runs, tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    Image.new("RGB", (4, 4), (20, 220, 20)).save(small)
    runs.sample(tmp_path / "free", "--count", "2")
    words = ["--guider", "squared", "--guider-weight", "0.1", "--guider-image", str(small)]
    runs.sample(tmp_path / "guided", "--count", "2", *words)
    free, guided = (np.abs(images(tmp_path / name).mean(axis=(1, 2)) - (20, 220, 20)) for name in ("free", "guided"))
    assert guided.sum() < free.sum()
    told = read_settings(tmp_path / "guided" / "000000.png")
    assert (told["guider"], told["guider_weight"]) == (f"squared to {small}", "0.1")


def test_scores_take_the_same_guides(runs: Runs) -> None:
    image = runs.root / "images" / "red" / "0.png"
    given = ["protocol=images", "model=somewhere", "guiders=[classifier,squared]"]
    paths = [f"guiders.classifier.run={runs.root}/classifier", f"guiders.squared.image={image}"]
    config = plain(compose("evaluate", [*given, *paths]))
    model = ldmlab.load(runs.root / "denoiser", device="cpu")
    assert model.reads == frozenset()
    model.with_guiders(*build_guiders(config["guiders"], model))
    assert model.reads == {"class_id"}
    assert model.info["guiders"]["classifier_scale"] == 10
    assert model.sample(class_id=[1, 0], steps=2).shape == (2, 16, 16, 3)
    assert plain(compose("evaluate", given[:2]))["guiders"] == {}


@pytest.mark.slow
def test_an_unconditional_model_is_led_away_from_its_own_earlier_weights(runs: Runs, tmp_path: Path) -> None:
    """By a checkpoint, a run and its raw weights; a model of other latents is refused before any image."""
    early = str(next((runs.root / "denoiser" / "checkpoints").glob("*.ckpt")))
    weak = str(runs.train("weak", "stage=diffusion", "conditioner=none", *TINY_UNET, "seed=7"))
    runs.sample(tmp_path / "plain", "--count", "2")
    runs.sample(tmp_path / "itself", "--count", "2", "--weak-model", early)
    runs.sample(tmp_path / "guided", "--count", "2", "--sweep", f"weak_model={weak},{weak}@raw")
    plain, itself = images(tmp_path / "plain"), images(tmp_path / "itself")
    assert np.abs(plain - itself).max() <= 1
    found = [np.asarray(Image.open(file)).astype(float) for file in sorted((tmp_path / "guided").glob("000000_*.png"))]
    assert len(found) == 2
    assert all(np.abs(one - plain[0]).max() > 1 for one in found)
    told = read_settings(tmp_path / "itself" / "000000.png")
    assert (told["weak_model"], told["guidance_scale"]) == (early, "2.0")
    other = runs.train("other_scale", "stage=diffusion", "conditioner=none", *TINY_UNET, "stage.latent_scale=0.5")
    sentence = refusal(lambda: runs.sample(tmp_path / "no", "--count", "1", "--weak-model", str(other)))
    assert f"--weak-model {other} has another latent scale than the model" in sentence
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_panels_are_guided_by_the_same_settings(runs: Runs) -> None:
    more = ["stage=diffusion", "conditioner=class_label", "conditioner.class_label.classes=2", *TINY_UNET]
    runs.train("panels", *more, "stage.guidance_interval=[0.1,0.8]", "stage.guidance_rescale=0.5")
    for option, sentence in (
        ("stage.guidance_interval=[0.8,0.1]", "is no interval of position"),
        ("stage.guidance_rescale=2", "guidance_rescale=2 is outside 0 .. 1"),
        ("stage.guided_channels=0", "guided_channels=0 guides nothing"),
    ):
        assert sentence in refusal(lambda option=option: runs.train("no", *more, option))  # type: ignore[misc]


def test_an_exported_classifier_is_the_same(runs: Runs, tmp_path: Path) -> None:
    assert cli.dispatch(["export", "--without-card", str(runs.root / "classifier"), str(tmp_path / "alone")]) == 0
    state, alone = (
        load_classifier(path).module.state_dict() for path in (runs.root / "classifier", tmp_path / "alone")
    )
    assert all(torch.equal(tensor, alone[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["0", "--classifier", "CLASSIFIER", "--classifier-scale", "-1"],
            "scale=-1.0 is not a finite number",
        ),
        (["0", "--classifier", "DENOISER"], "is a model of kind latent_diffusion, not classifier"),
        (["0", "--classifier-scale", "3"], "--classifier-scale 3.0 does nothing without --classifier"),
        (["--guider", "squared"], "--guider squared needs an image"),
        (["--guider", "squared", "--guider-image", "nowhere.png"], "nowhere.png cannot be read"),
        (["--guider", "cubic", "--guider-image", "IMAGE"], "--guider cubic is unknown; choose one of squared, lpips."),
        (["--guider-image", "IMAGE"], "does nothing without --guider"),
        (["--classifier", "CLASSIFIER"], "this model takes class_id as input"),
        (["0", "--classifier", "CLASSIFIER", "--guidance-scale", "3"], "--guidance-scale 3.0 needs conditions"),
    ],
)
def test_bad_choices_are_refused_before_any_work(runs: Runs, tmp_path: Path, words: list[str], message: str) -> None:
    known = {"CLASSIFIER": "classifier", "DENOISER": "denoiser", "IMAGE": "images/red/0.png"}
    given = [str(runs.root / known[word]) if word in known else word for word in words]
    assert message in refusal(lambda: runs.sample(tmp_path / "out", *given))
    assert not (tmp_path / "out").exists()


def test_classes_that_the_classifier_does_not_know(runs: Runs, tmp_path: Path) -> None:
    words = ["0", "2", "--classifier", str(runs.root / "classifier")]
    assert "is outside the classifier's 0 .. 1" in refusal(lambda: runs.sample(tmp_path / "out", *words))


def test_a_classifier_of_other_latents(runs: Runs, tmp_path: Path) -> None:
    options = ["stage=classifier", *TINY_CLASSIFIER, "trainer.max_steps=1"]
    other = runs.train("other", *options, "diffusion.schedule.end=0.0155", "stage.latent_scale=0.5")
    sentence = refusal(lambda: runs.sample(tmp_path / "out", "0", "--classifier", str(other)))
    assert "another latent scale and noise schedule than the model" in sentence


def test_data_that_do_not_fit(runs: Runs) -> None:
    few = ["stage=classifier", *TINY_CLASSIFIER]
    assert "data.fields=[class_id]" in refusal(lambda: runs.train("no", *few, "data.fields=[caption]"))
    sentence = refusal(lambda: runs.train("no", *few, "classifier.classes=1"))
    assert "classifier.classes=1 but the data have 2 classes" in sentence
    assert not (runs.root / "no").exists()


EDM2 = ["diffusion=edm", "backbone=edm2_xs", "backbone.model_channels=16", "backbone.channel_mult=[1,2]"]
EDM2 += ["backbone.num_res_blocks=1", "backbone.head_channels=16", "conditioner=class_one_hot"]
EDM = ["diffusion=edm_vp", "backbone=edm_ddpmpp", *EDM2[2:5], "conditioner=class_one_hot"]
MMDIT = ["diffusion=flow", "backbone=mmdit_s_2", "backbone.width=32", "backbone.depth=2", "backbone.heads=2"]
MMDIT += ["conditioner=class_label", "conditioner.class_label.width=16"]


@pytest.mark.parametrize("words", [EDM, EDM2, MMDIT], ids=["edm", "edm2", "mmdit"])
def test_other_backbones_train_and_sample_by_class(runs: Runs, tmp_path: Path, words: list[str]) -> None:
    more = ["stage=diffusion", "sampler=auto", "conditioner.class_label.classes=2", *TINY_UNET[2:]]
    run = runs.train(words[1].partition("=")[2], *words, *more)
    runs.sample(tmp_path / "out", "0", "1", model=run.name)
    first, second = images(tmp_path / "out")
    assert first.std() > 0
    assert not np.array_equal(first, second)
