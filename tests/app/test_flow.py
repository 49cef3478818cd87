"""A stranger's images go from a folder to scored samples by the README's steps alone."""

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from walk import SMALL, TINY_CLIP, TINY_UNET, Flow

import ldmlab
from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import evaluate
from ldmlab.checkpoints import load_checkpoint
from refusals import refusal

ROOT = Path(__file__).parents[2]


def test_bad_images_are_counted_and_named(flow: Flow) -> None:
    manifests = [json.loads((flow.packed / split / "manifest.json").read_text()) for split in ("train", "val")]
    assert sum(shard["samples"] for m in manifests for shard in m["shards"]) == 64
    told = "".join(path.read_text() for path in flow.packed.rglob("bad.json"))
    assert "empty.png" in told
    assert "torn.jpg" in told


def test_every_run_folder_is_whole(flow: Flow) -> None:
    for run in (flow.root / name for name in ("first_stage", "clip", "model")):
        for name in ("config.yaml", "model.yaml", "provenance.json", "metrics.csv", "finished.json"):
            assert (run / name).exists(), run / name
        for checkpoint in (run / "checkpoints").glob("*.ckpt"):
            assert "=" not in checkpoint.name
            assert load_checkpoint(checkpoint)["step"] in (1, 2)


def test_noise_levels_and_speed_are_logged(flow: Flow) -> None:
    rows = list(csv.DictReader((flow.root / "model" / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2"]
    assert any(name.startswith("loss_by_noise") for name in rows[0])
    assert {"speed/images_per_second", "val/loss", "data/skipped"} <= rows[-1].keys()


def test_sample_writes_images_with_their_settings(flow: Flow) -> None:
    out = flow.root / "samples"
    words = [
        "red circle",
        "синий квадрат",
        "--steps",
        "2",
        "--guidance-scale",
        "2",
        "--size",
        "16x32",
        "--out",
        str(out),
    ]
    assert cli.dispatch(["sample", str(flow.root / "model"), *words, "--device", "cpu"]) == 0
    image = Image.open(out / "000001.png")
    assert image.size == (32, 16)
    assert "синий квадрат" in "".join(str(value) for value in image.info.values())
    assert (out / "grid.png").exists()


@pytest.mark.slow
def test_a_run_a_checkpoint_and_an_exported_model_draw_the_same(flow: Flow) -> None:
    out = flow.root / "exported"
    assert cli.dispatch(["export", "--without-card", str(flow.root / "model"), str(out)]) == 0
    places = [flow.root / "model", flow.root / "model" / "checkpoints" / "step_00000002.ckpt", out]
    images = [ldmlab.load(p, device="cpu").sample(caption=["red circle"], steps=2, seed=3) for p in places]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


def test_evaluate_writes_a_page_that_opens_offline(flow: Flow) -> None:
    out = flow.root / "evaluation"
    small = ["protocol.samples=8", "protocol.steps=2", "protocol.neighbours=2", "protocol.metrics.kid.subset_size=4"]
    options = [f"model={flow.root}/model", "features=clip_run", f"features.run={flow.root}/clip", f"out={out}"]
    evaluate(plain(compose("evaluate", [*options, *small, "protocol=images", "device=cpu"])))
    result = json.loads((out / "metrics.json").read_text())
    assert set(result["scores"]) >= {"kid", "precision", "recall"}
    page = (out / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert (out / "report.md").read_text().startswith("#")


def test_a_first_stage_is_scored_by_its_reconstructions(flow: Flow) -> None:
    out = flow.root / "rebuilt"
    options = [f"model={flow.root}/first_stage", "features=clip_run", f"features.run={flow.root}/clip", f"out={out}"]
    small = ["protocol.metrics.kid.subset_size=4", "device=cpu"]
    evaluate(plain(compose("evaluate", [*options, "protocol=reconstruction", *small])))
    result = json.loads((out / "metrics.json").read_text())
    assert {"psnr", "ssim", "fid", "kid"} <= set(result["scores"])
    assert not result["paper"]["comparable"]
    assert "there and back" not in (out / "report.html").read_text()
    assert "Reconstructions of" in (out / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_score_a_first_stage_as_one_does(flow: Flow) -> None:
    options = [f"model={flow.root}/first_stage", "features=clip_run", f"features.run={flow.root}/clip", "device=cpu"]
    options += ["protocol=reconstruction", "protocol.metrics.kid.subset_size=4", "batch_size=3"]
    outs = [flow.root / "alone", flow.root / "together"]
    evaluate(plain(compose("evaluate", [*options, f"out={outs[0]}"])))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "evaluate.py"), *options, f"out={outs[1]}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    alone, together = (json.loads((out / "metrics.json").read_text()) for out in outs)
    assert together["reference"]["images"] == alone["reference"]["images"]
    assert together["images"] == alone["images"]
    for name, score in alone["scores"].items():
        assert together["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-4, abs=1e-5), name


@pytest.mark.slow
def test_a_run_in_parts_is_loaded_exported_scored_and_continued(flow: Flow, tmp_path: Path) -> None:
    """What two processes trained, each a part of the weights, is a run as any other."""
    run = flow.root / "parts"
    given = [*SMALL, "trainer=fsdp", "trainer.micro_batch=4", *flow.data, *TINY_UNET, f"run.dir={run}"]
    given += [f"data.latents={flow.root}/latents", f"conditioner.text.from_run={flow.root}/clip"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "train.py"), "experiment=mine/text_to_image", *given]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    checkpoint = run / "checkpoints" / "step_00000002.ckpt"
    assert {path.name for path in checkpoint.iterdir()} == {
        *("shard_00000.safetensors", "shard_00001.safetensors", "state.ckpt"),
    }
    assert cli.dispatch(["export", "--without-card", str(checkpoint), str(tmp_path / "exported")]) == 0
    images = [
        ldmlab.load(path, device="cpu").sample(caption=["red circle"], steps=2, seed=3)
        for path in (run, checkpoint, tmp_path / "exported", flow.root / "model")
    ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    torch.testing.assert_close(images[0], images[3], rtol=0, atol=0.02)  # two steps of Adam from the same start
    small = ["protocol.samples=8", "protocol.steps=2", "protocol.neighbours=2", "protocol.metrics.kid.subset_size=4"]
    options = [f"model={checkpoint}", "features=clip_run", f"features.run={flow.root}/clip", f"out={tmp_path / 'out'}"]
    evaluate(plain(compose("evaluate", [*options, *small, "protocol=images", "device=cpu"])))
    assert "kid" in json.loads((tmp_path / "out" / "metrics.json").read_text())["scores"]
    flow.denoiser(f"init_from={checkpoint}", "trainer.max_steps=1", out="from_parts")
    flow.denoiser("trainer.max_steps=3", out="parts")
    assert load_checkpoint(run / "checkpoints" / "step_00000003.ckpt")["position"] == 24


@pytest.mark.slow
def test_a_run_starts_from_another_ones_weights(flow: Flow) -> None:
    zero = "trainer.max_steps=1"
    flow.denoiser(f"init_from={flow.root}/model", zero, "optimizer.learning_rate=1e-12", out="started")
    before = load_checkpoint(flow.root / "model" / "checkpoints" / "step_00000002.ckpt")
    after = load_checkpoint(flow.root / "started" / "checkpoints" / "step_00000001.ckpt")
    name = "conv_in.weight"
    averaged = before["averaged"]["denoiser"]["weights"][name]  # a run starts from averaged weights
    torch.testing.assert_close(after["modules"]["denoiser"][name], averaged, atol=1e-6, rtol=0)


@pytest.mark.slow
def test_initial_weights_and_a_run_of_another_encoder_are_refused(flow: Flow) -> None:
    flow.clip("seed=5", out="other_clip")
    options = [f"init_from={flow.root}/model", f"conditioner.text.from_run={flow.root}/other_clip"]
    sentence = refusal(lambda: flow.denoiser(*options, out="two_encoders"))
    assert f"conditioner.text.from_run={flow.root}/other_clip" in sentence
    assert f"init_from={flow.root}/model" in sentence
    assert not (flow.root / "two_encoders").exists()


@pytest.mark.slow
def test_a_finished_run_names_its_place_its_metrics_and_the_next_command(
    flow: Flow, capsys: pytest.CaptureFixture[str]
) -> None:
    flow.first_stage(out="short_stage")
    first = capsys.readouterr().err.splitlines()[-5:]
    assert first[0] == f"finished: {flow.root}/short_stage"
    assert first[1].startswith("validation at step 2: ")
    psnr = list(csv.DictReader((flow.root / "short_stage" / "metrics.csv").open()))[-1]["val/psnr"]
    assert f"psnr {float(psnr):.4g} ↑" in first[1]
    assert [line.partition(":")[0] for line in first[2:]] == ["cost", "falls short", "next"]
    flow.first_stage(out="short_stage")  # nothing to train
    assert capsys.readouterr().err.splitlines()[-5:] == first
    _, command = first[4].split("next: ldmlab ")
    assert cli.dispatch(shlex.split(command)) == 0
    assert (flow.root / "short_stage-latents" / "train" / "manifest.json").exists()
    flow.denoiser()  # the walk's own, finished too
    assert capsys.readouterr().err.splitlines()[-1] == f"next: ldmlab evaluate model={flow.root}/model"


@pytest.mark.slow
def test_the_same_command_goes_on_where_the_run_stopped(flow: Flow) -> None:
    shutil.copytree(flow.root / "clip", flow.root / "longer_clip")
    flow.clip("trainer.max_steps=3", out="longer_clip")
    assert (flow.root / "longer_clip" / "checkpoints" / "step_00000003.ckpt").exists()
    rows = list(csv.DictReader((flow.root / "longer_clip" / "metrics.csv").open()))
    assert [row["step"] for row in rows] == ["1", "2", "3"]


@pytest.mark.slow
def test_training_on_the_fly_needs_no_latents(flow: Flow) -> None:
    flow.denoiser("data.latents=null", f"from_run={flow.root}/first_stage", out="online")
    cached, online = (
        yaml.safe_load((flow.root / run / "model.yaml").read_text())["latent_scale"] for run in ("model", "online")
    )
    assert online["std"] == pytest.approx(cached["std"], rel=1e-3)  # latent shards keep moments in float16
    assert online["shift"] == pytest.approx(cached["shift"], rel=1e-3, abs=1e-3)


@pytest.mark.slow
def test_a_sweep_gives_every_job_a_folder_of_its_own(flow: Flow, tmp_path: Path) -> None:
    """Hydra itself leaves nothing behind, and the jobs do not share a folder."""
    options = [*SMALL, *flow.data, *TINY_CLIP, f"paths.runs={tmp_path}/runs", "seed=0,1"]
    command = [sys.executable, str(ROOT / "train.py"), "-m", "experiment=mine/clip", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    runs = [path for path in (tmp_path / "runs").iterdir() if path.is_dir()]
    assert len(runs) == 2
    assert {yaml.safe_load((run / "config.yaml").read_text())["seed"] for run in runs} == {0, 1}
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
