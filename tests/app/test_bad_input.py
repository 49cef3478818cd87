"""Each kind of bad input ends in one sentence that names it, before any work is lost."""

import errno
import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from walk import Flow, run_training

import ldmlab
from ldmlab.app import cli
from ldmlab.app.cli import run_command
from refusals import refusal


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def test_shards_without_manifest(flow: Flow, tmp_path: Path) -> None:
    train = copied(flow.packed / "train", tmp_path / "train")
    (train / "manifest.json").unlink()
    (train / "plan.json").unlink()
    sentence = refusal(lambda: flow.first_stage(f"data.train={train}", out="never"))
    assert "ldmlab index" in sentence


def test_a_shard_shorter_than_its_manifest_says(flow: Flow, tmp_path: Path) -> None:
    train = copied(flow.packed / "train", tmp_path / "train")
    tar = next(train.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-2048])
    assert "shorter than its manifest records" in refusal(lambda: flow.first_stage(f"data.train={train}", out="never"))


@pytest.mark.slow
def test_latents_of_another_first_stage(flow: Flow) -> None:
    if not (flow.root / "other" / "finished.json").exists():
        flow.first_stage("seed=1", out="other")
    sentence = refusal(lambda: flow.denoiser(f"from_run={flow.root}/other", out="never"))
    assert "another first stage" in sentence
    sentence = refusal(lambda: flow.encode(f"from_run={flow.root}/other"))
    assert "another first stage" in sentence


def test_an_image_size_that_f_does_not_divide(flow: Flow) -> None:
    assert "use 16 or 20" in refusal(lambda: flow.first_stage("data.image_size=18", out="never"))


@pytest.mark.slow
def test_guidance_on_a_model_trained_without_dropout(flow: Flow, tmp_path: Path) -> None:
    if not (flow.root / "undropped" / "finished.json").exists():
        flow.denoiser("conditioner.text.drop=0", out="undropped")
    words = ["red circle", "--steps", "2", "--guidance-scale", "3", "--out", str(tmp_path / "s"), "--device", "cpu"]
    assert "guidance" in refusal(lambda: cli.dispatch(["sample", str(flow.root / "undropped"), *words]))
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("damage", ["missing", "torn", "no description"])
def test_a_model_folder_that_is_not_whole(flow: Flow, tmp_path: Path, damage: str) -> None:
    model = tmp_path / "model"
    assert cli.dispatch(["export", "--without-card", str(flow.root / "model"), str(model)]) == 0
    weights = model / "denoiser.safetensors"
    if damage == "missing":
        weights.unlink()
    elif damage == "torn":
        weights.write_bytes(weights.read_bytes()[:-100])
    else:
        (model / "model.yaml").unlink()
    named = "model.yaml" if damage == "no description" else "denoiser.safetensors"
    assert named in refusal(lambda: ldmlab.load(model, device="cpu"))


def test_a_model_that_names_code_of_others(flow: Flow, tmp_path: Path) -> None:
    model = tmp_path / "model"
    cli.dispatch(["export", "--without-card", str(flow.root / "model"), str(model)])
    text = (model / "model.yaml").read_text().replace("ldmlab.backbones.unet.UNet", "os.system")
    (model / "model.yaml").write_text(text)
    assert "backbone._target_=os.system" in refusal(lambda: ldmlab.load(model, device="cpu"))


@pytest.mark.slow
def test_no_disk_space(flow: Flow, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint")

    monkeypatch.setattr("ldmlab.checkpoints.torch.save", full)
    assert run_command(lambda: flow.clip(out="full")) == 2
    assert "space" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_in_use(flow: Flow, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "holds other files" in refusal(lambda: flow.clip(f"run.dir={tmp_path}"))
    assert "not empty" in refusal(
        lambda: cli.dispatch(["export", "--without-card", str(flow.root / "model"), str(tmp_path)])
    )


@pytest.mark.slow
def test_unknown_names(flow: Flow) -> None:
    assert "did you mean" in refusal(lambda: run_training("mine/clip", *flow.data, "trainer.max_step=3"))
    assert "did you mean" in refusal(lambda: run_training("mine/clipp", *flow.data))
    sentence = refusal(lambda: run_training("mine/clip", *flow.data, "+trainer.colour=red", f"run.dir={flow.root}/no"))
    assert "trainer.colour" in sentence
    assert "did you mean seed?" in refusal(lambda: run_training("mine/clip", *flow.data, "+seeds=3"))


def test_a_first_stage_that_was_never_trained(flow: Flow) -> None:
    sentence = refusal(lambda: flow.denoiser("data.latents=null", "first_stage=kl_f4_small", out="never"))
    assert "ldmlab encode" in sentence


def test_a_run_of_another_kind(flow: Flow) -> None:
    assert "not latent_diffusion" in refusal(lambda: ldmlab.load(flow.root / "clip", device="cpu"))
    assert "not clip" in refusal(
        lambda: flow.denoiser(f"conditioner.text.from_run={flow.root}/first_stage", out="never")
    )


def test_a_manifest_of_another_version(flow: Flow, tmp_path: Path) -> None:
    train = copied(flow.packed / "train", tmp_path / "train")
    manifest = json.loads((train / "manifest.json").read_text())
    (train / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    assert "format_version=99" in refusal(lambda: flow.first_stage(f"data.train={train}", out="never"))


@pytest.mark.slow
def test_values_beyond_any_sense(flow: Flow, tmp_path: Path) -> None:
    sentence = refusal(lambda: flow.encode("batch_size=-1", out="never"))
    assert sentence == "batch_size=-1 must be at least 1."
    sentence = refusal(lambda: flow.encode("data.image_size=100000000", out="never"))
    assert sentence.endswith("data.image_size=100000000 is no side of an image; choose 1 .. 65536 px."), sentence
    for value in ("-1", "1"):
        sentence = refusal(lambda value=value: flow.encode(f"max_bad={value}", out="never"))
        assert sentence.endswith(f"max_bad={float(value):g} is no fraction; choose 0 or more, below 1."), sentence
    words = ["encode", "data=shards", *flow.data[:2], f"from_run={flow.root}/first_stage", "out=''"]
    assert refusal(lambda: cli.dispatch(words)) == "out='' is empty; give a value, or leave the option out."
    assert refusal(lambda: flow.encode("splits=[]", out="never")).startswith("splits=[] is empty")
    words = ["evaluate", "model=none", "features=clip_run", "features.run=3"]
    assert refusal(lambda: cli.dispatch(words)).startswith("features.run=3 is not text; quote it twice")
    sentence = refusal(lambda: flow.denoiser("conditioner.text.from_run=3", out="never"))
    assert sentence.startswith("conditioner.text.from_run=3 is not text; quote it twice")
    words = ["export", "--without-card", str(flow.root / "first_stage"), str(tmp_path / "out"), "--weights", "both"]
    assert "weights=both is unknown" in refusal(lambda: cli.dispatch(words))
    words = ["pack", str(flow.images), str(tmp_path / "out"), "--layout", "tars"]
    assert "holds no images in tars; give another folder, or another --layout" in refusal(lambda: cli.dispatch(words))


def test_the_model_is_read_before_the_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "empty"))
    assert "no model.yaml, so it is no model" in refusal(lambda: cli.dispatch(["evaluate", f"model={tmp_path}/nosuch"]))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="Linux's folder of processes")
def test_a_place_that_takes_no_files(flow: Flow) -> None:
    for step in (flow.encode, flow.first_stage):
        assert "proc takes no new files" in refusal(partial(step, out=f"{'../' * 20}proc/out"))
    words = ["export", "--without-card", str(flow.root / "first_stage"), "/proc/out"]
    assert "/proc takes no new files" in refusal(lambda: cli.dispatch(words))


@pytest.mark.parametrize(
    "words", [["pack", "in", "out", "--exclude", "a", "--exclude", "b"], ["plan", "--price", "1", "--price=2"]]
)
def test_an_option_given_twice_is_not_half_ignored(words: list[str]) -> None:
    assert "is given twice" in refusal(lambda: cli.dispatch(words))


def test_an_option_that_is_no_number_is_not_given_twice() -> None:
    assert "--length=nan is not the length" in refusal(lambda: cli.dispatch(["average", "run", "--length", "nan"]))
