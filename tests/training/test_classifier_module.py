"""Training of a classifier of noisy latents: it learns, tells noise levels apart, resumes and shares work exactly."""

import json
import random
from pathlib import Path
from typing import Any

import forked
import pytest
import pytorch_lightning as pl
import torch
from toy_stages import Keys, image_batch, options, settings

from ldmlab import distributed
from ldmlab.backbones.latent_classifier import LatentClassifier
from ldmlab.checkpoints import load_checkpoint
from ldmlab.contracts import Level
from ldmlab.diffusion.guidance import ClassifierGuider
from ldmlab.diffusion.latent_space import LatentScale, LatentSpace
from ldmlab.diffusion.schedule import Schedule
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.randomness import normal
from ldmlab.training.callbacks.noise_levels import NoiseLevels
from ldmlab.training.classifier_module import ClassifierStage
from ldmlab.training.data_module import Batches
from ldmlab.training.fit import fit
from ldmlab.training.optim import AdamW, Constant
from ldmlab.training.run_folder import RunFolder

CLASSES = 4


def toy_batch(positions: range) -> dict[str, Any]:
    """Latents 4 x 4 whose channel means tell the class, as posteriors with a little spread."""
    batch = image_batch(positions)
    batch.pop("image")
    index = torch.tensor([p % 50 for p in positions])
    means = normal(7, "class", batch["class_id"], (2, 1, 1))
    mean = 1.5 * means + 0.5 * normal(7, "picture", index, (2, 4, 4))
    return {**batch, "moments": torch.cat([mean, torch.full_like(mean, -6.0)], dim=1)}


class Stage(Identity):
    """Latents of two channels; nothing is ever encoded."""

    latent_channels = 2


def stage(dropout: float = 0.0, **changes: Any) -> ClassifierStage:
    torch.manual_seed(0)
    classifier = LatentClassifier(
        latent_channels=2, classes=CLASSES, model_channels=32, channel_mult=[1], num_res_blocks=1,
        attention_downsampling=[], head_channels=32, dropout=dropout,
    )  # fmt: skip
    space = LatentSpace(Stage(), LatentScale(1.6))
    return ClassifierStage(
        space=space,
        schedule=Schedule("scaled_linear", steps=100),
        classifier=classifier,
        noise_bins=5,
        **options(**changes),
    )


def train(made: ClassifierStage, folder: Path, micro: int = 4, callbacks: Any = (), **changes: Any) -> Path:
    random.seed(5)

    def endless(position: int) -> Any:
        while True:
            yield toy_batch(range(position, position + micro))
            position += micro

    run = RunFolder.at(folder)
    try:
        return fit(
            made,
            Batches(endless, lambda: [toy_batch(range(start, start + 25)) for start in (0, 25)]),
            run=run,
            settings=settings(micro_batch=micro, max_steps=made.max_steps, **changes),
            callbacks=callbacks,
        )
    finally:
        run.close()


class Held(pl.Callback):
    """Keeps the numbers of the latest evaluation."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.numbers = pl_module.validated


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassifierStage, dict[str, float]]:
    """200 steps on the toy latents."""
    held = Held()
    made = stage(max_steps=200, optimizer=AdamW(2e-3), lr_schedule=Constant(), averaging_decay=0.98)
    every = {"log_every": 50, "validate_every": 200, "checkpoint_every": 200}
    train(made, tmp_path_factory.mktemp("learned") / "run", 16, [held, NoiseLevels(bins=5)], **every)
    return made, held.numbers


def test_it_beats_chance_and_more_so_with_less_noise(learned: tuple[ClassifierStage, dict[str, float]]) -> None:
    _, numbers = learned
    assert numbers["accuracy"] > 0.6  # chance: 0.25
    cleanest, noisiest = numbers["accuracy_by_noise/0.00"], numbers["accuracy_by_noise/0.80"]
    assert cleanest > 0.9
    assert cleanest > noisiest
    bins = [value for name, value in numbers.items() if name.startswith("accuracy_by_noise/")]
    assert len(bins) == 5
    assert min(bins) <= numbers["accuracy"] <= max(bins)


def test_the_training_loss_is_logged_by_noise_level(learned: tuple[ClassifierStage, dict[str, float]]) -> None:
    made, _ = learned
    extras = made.extras["classifier"]
    assert extras["loss"].shape == extras["level"].shape == (16,)
    assert 0 <= extras["level"].min() <= extras["level"].max() < 1


def test_it_guides_to_its_classes(learned: tuple[ClassifierStage, dict[str, float]]) -> None:
    """Estimates of noisy images of all classes move towards the mean of the class that is asked for."""
    made, _ = learned
    means = 1.5 * normal(7, "class", torch.arange(CLASSES), (2, 1, 1)) / 1.6  # of final latents
    clean = made.space.latents(toy_batch(range(40)), 0)
    alpha, sigma = (float(v) for v in made.schedule.levels(torch.tensor([60])))
    level = Level(alpha, sigma, 60.0)
    x = alpha * clean + sigma * normal(0, "x", torch.arange(40), (2, 4, 4))
    for wanted in range(CLASSES):
        guide = ClassifierGuider(made.classifier, 1.0)
        shift = guide(lambda x, level: clean, {"class_id": torch.full((40,), wanted)})(x, level) - clean
        assert float((shift * (means[wanted] - clean)).sum()) > 0


def test_the_held_out_numbers_are_the_same_every_time_and_in_any_batches() -> None:
    made = stage()
    made.eval()
    with torch.no_grad():
        whole = made.validate([toy_batch(range(20))])
        parts = made.validate([toy_batch(range(6)), toy_batch(range(6, 20))])
    assert whole == pytest.approx(parts, abs=1e-6)
    assert made.validate([]) == {}


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path) -> None:
    every = {"validate_every": 5}  # the stopped run ends with an evaluation
    straight = train(stage(dropout=0.3), tmp_path / "straight", callbacks=[Keys(tmp_path / "a")], **every)
    train(stage(dropout=0.3, max_steps=5), tmp_path / "stopped", callbacks=[Keys(tmp_path / "b")], **every)
    resumed = train(stage(dropout=0.3), tmp_path / "stopped", callbacks=[Keys(tmp_path / "b")], **every)
    forked.same(load_checkpoint(straight), load_checkpoint(resumed))
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


def test_labels_without_an_output_are_refused() -> None:
    batch = {**toy_batch(range(4)), "class_id": torch.tensor([0, 1, 4, 2])}
    with pytest.raises(InputError, match=r"class_id 0 \.\. 4 does not fit classifier.classes=4"):
        stage().transfer_batch_to_device(batch, torch.device("cpu"), 0)
    with pytest.raises(InputError, match="val_draws=0"):
        ClassifierStage(
            space=LatentSpace(Stage(), LatentScale()), schedule=Schedule(), classifier=stage().classifier,
            val_draws=0, **options(),
        )  # fmt: skip


def member(rank: int, world: int, folder: Path) -> None:
    made = stage()
    made.eval()
    distributed.join()
    with torch.no_grad():
        numbers = made.validate([toy_batch(range(10 * rank, 10 * rank + 10))])
    (folder / str(rank)).write_text(json.dumps(numbers))


def test_two_processes_hold_the_same_numbers_as_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert forked.finish(*forked.group(2, member, tmp_path, log=log)) == [0, 0], log.read_text()
    made = stage()
    made.eval()
    with torch.no_grad():
        only_trainable = made.validate([toy_batch(range(20))])
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == pytest.approx(only_trainable, abs=1e-6)
