"""A typed option that another one overrides, or that nothing reads, is refused; defaults are no choices."""

import os
import signal
import sys
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import yaml

from format1_artefacts import config_of, unpack
from ldmlab.app.conf_files import check_added, chosen_options
from ldmlab.app.wiring import train
from ldmlab.data import loaders
from ldmlab.errors import InputError
from ldmlab.training.callbacks.skipped import Skipped


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(unpack(tmp_path))
    return tmp_path


def config(run: str, **changes: Any) -> dict[str, Any]:
    made = config_of(Path(run))
    made["run"] = {**made["run"], "dir": "new"}
    made["trainer"]["max_steps"] = 1
    for name, value in changes.items():
        node: Any = made
        *path, last = name.split("__")
        for part in path:
            node = node[part]
        node[last] = value
    return made


LATENTS: dict[str, Any] = {}
ON_THE_FLY = {"data__latents": None, "from_run": "exported"}


@pytest.mark.parametrize(
    ("run", "changes", "chosen", "message"),
    [
        ("model", LATENTS, "first_stage", "first_stage: the first stage comes with data.latents=latents"),
        ("model", LATENTS, "first_stage.channels", "first_stage.channels: the first stage comes with data.latents"),
        ("model", ON_THE_FLY, "first_stage", "first_stage: the first stage comes with from_run=exported"),
        ("model", LATENTS, "loss", "loss: stage=diffusion reads no loss"),
        ("model", LATENTS, "loss.reduction", "loss.reduction: stage=diffusion reads no loss"),
        ("model", LATENTS, "clip.config.embed_dim", "clip.config.embed_dim: stage=diffusion reads no clip"),
        ("model", LATENTS, "classifier.classes", "classifier.classes: stage=diffusion reads no classifier"),
        ("model", {"data__image_size": 32}, "data.image_size", "data.image_size=32: data.latents=latents were made"),
        ("model", {"conditioner__class_label__drop": 0.0}, "stage.guidance_scale", "are never dropped in training"),
        ("model", {"stage__guidance_scale": 1.0}, "stage.guided_channels", "does nothing at stage.guidance_scale=1"),
        ("model", LATENTS, "data.balance_temperature", "has no effect without data.balance"),
        ("first_stage", LATENTS, "data.shard_cache_gib", "has no effect without shards at an address"),
        ("first_stage", LATENTS, "data.cache_limit_gib", "has no effect without data.cache"),
        ("first_stage", LATENTS, "backbone.dropout", "backbone.dropout: stage=autoencoder reads no backbone"),
        ("first_stage", LATENTS, "diffusion.prediction", "stage=autoencoder reads no diffusion"),
        ("first_stage", LATENTS, "sampler", "sampler: stage=autoencoder reads no sampler"),
        ("first_stage", {"from_run": "exported"}, "from_run", "from_run: stage=autoencoder reads no from_run"),
        ("first_stage", LATENTS, "stage.codebook_window", "this first stage has no codebook"),
    ],
)
def test_a_choice_that_would_be_passed_over_is_refused(
    run: str, changes: dict[str, Any], chosen: str, message: str, there: Path
) -> None:
    with pytest.raises(InputError, match=message):
        train(config(run, **changes), chosen=[chosen])
    assert not Path("new").exists()


def test_a_network_that_comes_with_a_run_takes_no_other_options() -> None:
    from ldmlab.app.conf_files import check_choices

    text = {"from_run": "runs/clip", "config": {}, "name": None, "layer": "last"}
    whole = {"stage": {"name": "diffusion"}, "data": {"latents": None}, "from_run": None, "conditioner": {"text": text}}
    check_choices(whole, ["conditioner.text.from_run", "conditioner.text.layer", "conditioner"])
    with pytest.raises(InputError, match=r"the network comes with conditioner.text.from_run=runs/clip"):
        check_choices(whole, ["conditioner.text.config.width"])


@pytest.mark.parametrize("changes", [LATENTS, ON_THE_FLY])
def test_the_record_shows_the_first_stage_that_was_used(changes: dict[str, Any], there: Path) -> None:
    before = config("model", **changes)
    assert before["first_stage"]["channels"] == 128  # Hydra's default, which is no choice
    train(before, chosen=["trainer.max_steps", "data.latents", "from_run", "conditioner", "stage"])
    recorded = yaml.safe_load(Path("new/config.yaml").read_text())
    assert recorded["first_stage"]["channels"] == 4
    assert recorded["first_stage"] == yaml.safe_load(Path("new/model.yaml").read_text())["first_stage"]


def test_typed_words_are_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["experiment=demo/x", "first_stage=vq_f16", "+callbacks.mine=1", "~task", "++data.mix=3", "/features@a.b=c"]
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    expected = {"experiment", "first_stage", "callbacks.mine", "task", "data.mix", "/features"}
    assert chosen_options() == expected


def test_initial_weights_keep_this_runs_scale(there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ldmlab.model_files import read_model

    train(config("model", init_from="model", stage__latent_scale=0.5))
    files = read_model("new")
    assert files.spec["latent_scale"]["std"] == pytest.approx([2.0])
    assert files.parts["latent_scale"]["std"].flatten().tolist() == pytest.approx([2.0])
    assert "init_from=model: its latents were divided by" in capsys.readouterr().err


def test_a_dead_loader_process_is_one_sentence(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after_batch = Skipped.on_train_batch_end

    def kill(self: Skipped, *arguments: Any) -> None:
        for child in active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
        after_batch(self, *arguments)

    monkeypatch.setattr(Skipped, "on_train_batch_end", kill)
    made = config("first_stage", data__workers=1, trainer__max_steps=60, trainer__validate_every=60)
    with pytest.raises(InputError, match=r"a loader process ended \(.*(killed|exited).*data.workers"):
        train(made)


@pytest.mark.parametrize("length", [76, 150])
def test_a_long_temporary_folder_is_refused_before_anything_hangs(
    length: int, there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders.tempfile, "gettempdir", lambda: "/" + "t" * (length - 1))
    with pytest.raises(InputError, match=r"TMPDIR=/t+ is longer than the 75 characters"):
        train(config("first_stage", data__workers=1))
    assert not Path("new").exists()
    train(config("first_stage", data__workers=0))


@pytest.mark.parametrize(("program", "word"), [("evaluate", "+metric.x=1"), ("encode", "+colour=red")])
def test_an_added_option_that_nothing_reads(program: str, word: str) -> None:
    with pytest.raises(InputError, match="nothing reads this option"):
        check_added(program, [word])
    check_added(program, ["+data.more=1" if program == "encode" else "+protocol.more=1", "+hydra.x=1", "out=x"])
