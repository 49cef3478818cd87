"""A typed option that another one overrides, or that nothing reads, is refused; defaults are no choices."""

import importlib
import inspect
import os
import re
import signal
import sys
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from format1_artefacts import config_of, unpack
from ldmlab.app import cli
from ldmlab.app.conf_files import check_added, check_effects, check_heads, chosen_options, leaves
from ldmlab.app.evaluate import check_read
from ldmlab.app.wiring import train
from ldmlab.argument_types import declared, idle
from ldmlab.data import loaders
from ldmlab.errors import InputError
from ldmlab.first_stages.deep_compression_blocks import LinearAttention
from ldmlab.inference.sample_settings import sampler_by_name
from ldmlab.training.callbacks.skipped import Skipped
from refusals import refusal

CONF = Path(__file__).parents[2] / "conf"


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
        ("model", {"callbacks": {}}, "stage.panel_count", "stage.panel_count has no effect without callbacks.panels"),
        (
            "model",
            {"callbacks": {}},
            "stage.guidance_scale",
            "guidance_scale has no effect without callbacks",
        ),
        ("model", {"callbacks": {}}, "sampler.eta", "sampler.eta has no effect without callbacks.panels"),
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


def _declared() -> dict[str, type]:
    """Every part of conf/ that declares options without effect, by its target."""
    found = {}
    for file in (f for f in CONF.rglob("*.yaml") if f.parent.name != "hydra"):
        for name, value in leaves(yaml.safe_load(file.read_text())):
            if name.split(".")[-1] == "_target_" and str(value).startswith("ldmlab."):
                module, _, part = value.rpartition(".")
                found[value] = getattr(importlib.import_module(module), part)
    return {target: part for target, part in found.items() if hasattr(part, "idle_without")}


def test_what_parts_declare_about_their_options_is_about_their_options() -> None:
    parts = _declared()
    assert len(parts) > 20
    for target, part in parts.items():
        known = inspect.signature(part).parameters
        for option, condition in declared(part):
            named = {way.partition("=")[0].rstrip("!") for way in condition.split(" or ")}
            inherited = "idle_without" not in vars(part)  # of a base class with more options
            assert {option, *named} <= known.keys() or inherited or target.startswith("ldmlab.samplers."), target


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            "backbones.dit.DiT",
            {"route_share": 0.3},
            "x.route_share=0.3 has no effect without x.route; set that too, or",
        ),
        (
            "diffusion.schedule.Schedule",
            {"start": 0.1, "name": "cosine"},
            "x.start=0.1 has no effect with x.name=cosine",
        ),
        ("diffusion.schedule.Schedule", {"cosine_offset": 0.1}, "has no effect with x.name=scaled_linear"),
        ("losses.latent_regularisers.LatentRegularisers", {"least_channels": 4}, "without x.masked"),
        ("losses.latent_regularisers.LatentRegularisers", {"noise_spread": "fixed", "noise": 0.0}, "without x.noise"),
        ("losses.latent_regularisers.LatentRegularisers", {"least_scale": 0.5}, "without x.equivariance or x.low_res"),
        ("diffusion.alignment.Alignment", {"hidden": 8, "projector": "conv"}, "with x.projector=conv"),
        ("first_stages.vq.VQModel", {"codebook_weight": 1.0, "codebook_decay": 0.9}, "with x.codebook_decay=0.9"),
        ("samplers.ode.Ode", {"method": "rk4", "rtol": 0.1}, "has no effect with x.method=rk4"),
    ],
)
def test_an_option_that_another_one_switches_off(
    target: str, options: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _, part = f"ldmlab.{target}".rpartition(".")
    node = {"_target_": f"ldmlab.{target}", **options}
    (_, text, in_vain), *rest = idle(getattr(importlib.import_module(module), part), node, "x")
    assert message in text
    assert not rest
    assert in_vain == (len(options) == 1 or options.get("noise") == 0)  # nobody switched it off: a line is said


def test_such_an_option_is_refused_where_typed_and_named_where_a_file_has_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = {"sampler": {"_target_": "ldmlab.samplers.heun.Heun", "churn_noise": 1.003}}
    with pytest.raises(InputError, match=r"sampler\.churn_noise=1\.003 has no effect without sampler\.churn; "):
        check_effects(node, ["sampler.churn_noise"])
    check_effects(node, ["sampler"])
    assert "churn_noise=1.003 has no effect" in capsys.readouterr().err
    check_effects({"sampler": {**node["sampler"], "churn": 40.0}}, ["sampler.churn_noise"])
    assert not capsys.readouterr().err


def test_no_file_of_ours_sets_an_option_in_vain(capsys: pytest.CaptureFixture[str]) -> None:
    for file in (f for f in sorted(CONF.glob("*/*.yaml")) if f.parent.name not in ("hydra", "sweeper", "launcher")):
        node = yaml.safe_load(file.read_text()) or {}
        node.pop("defaults", None)
        check_effects({file.parent.name: node}, ())
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ddim", {"temperature": 0.5}, "sampler.temperature=0.5 has no effect without sampler.eta"),
        ("heun:churn_min=0.1", {}, "sampler.churn_min=0.1 has no effect without sampler.churn"),
        ("ode:method=rk4:rtol=0.1", {}, "sampler.rtol=0.1 has no effect with sampler.method=rk4"),
    ],
)
def test_a_sampler_takes_no_option_that_it_would_pass_over(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        sampler_by_name(name, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fetch", "lpips", "--model", "ViT-B-32"], "--model and --pretrained are for clip"),
        (["fetch", "clip", "--url", "http://x"], "--url http://x is the address of one file other than clip"),
        (["report", "x", "--format", "md", "--out", "y"], "--out y is for pages, and --format md prints"),
        (["dashboard", "x", "--wandb", "a/b", "--out", "y"], "--out y is for a page, and --wandb saves a view"),
        (["first-stage", "x", "--without-generation", "--seeds", "2"], "--seeds: --without-generation makes no use"),
        (["encode", "from_run=x", "out=y", "data.mix=3"], "data.mix has no effect on latents"),
    ],
)
def test_a_flag_that_another_one_switches_off(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cli.dispatch(words)


def test_the_scores_of_a_first_stage_take_no_settings_of_samples(there: Path) -> None:
    for name in ("protocol.steps", "protocol.evaluators.class.steps", "guiders", "precision"):
        with pytest.raises(InputError, match=f"{name}: model=first_stage is a first stage"):
            check_read({"model": "first_stage", "protocol": {}}, [name])
        check_read({"model": "model", "protocol": {}}, [name])
    check_read(
        {"model": "first_stage", "protocol": {}},
        ["protocol", "protocol.metrics.kid.at_most", "protocol.reference", "out"],
    )


def test_heads_that_leave_channels_out() -> None:
    blocks = {width: LinearAttention(32, width, [], "rms_norm") for width in (8, 7)}
    check_heads(8, blocks[8])
    for block in (blocks[7], torch.nn.Linear(1, 1)):
        with pytest.raises(InputError, match="attention_head_dim=7 divides no level of EfficientViTBlock, or leaves"):
            check_heads(7, block)


COMPARED = ["data=shards", "data.train=nowhere/train", "data.val=nowhere/val"]  # with a model of 64 px


@pytest.mark.parametrize("program", [["evaluate", "model=emoji"], ["audit", "emoji"], ["first-stage", "emoji"]])
@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("data.latents=nowhere", "data.latents: only training reads it"),
        ("data.image_size=32", "data.image_size=32: images are compared at 64 px"),
        ("data.image_size=64", "nowhere"),
        ("data.workers=0", "nowhere"),  # and the model gives the size
    ],
)
def test_real_images_are_compared_by_no_option_of_training(
    program: list[str],
    word: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    features = ["features=pixels"] if program[0] == "evaluate" else ["--features", "pixels"]
    out = [f"out={tmp_path / 'out'}"] if program[0] == "evaluate" else ["--out", str(tmp_path / "out")]
    more = ["--without-generation"] if program[0] == "first-stage" else []
    monkeypatch.setattr(sys, "argv", ["ldmlab", *program, *COMPARED, word, *features, *more, *out])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("word", ["data.flip=true", "data.balance=style", "data.mix=4"])
def test_only_the_denoisers_of_a_sheet_read_options_of_training(word: str, tmp_path: Path) -> None:
    words = ["first-stage", "emoji", *COMPARED, word, "--features", "pixels", "--out", str(tmp_path / "out")]
    assert "only training reads it" in refusal(lambda: cli.dispatch([*words, "--without-generation"]))
    assert "nowhere" in refusal(lambda: cli.dispatch(words))
