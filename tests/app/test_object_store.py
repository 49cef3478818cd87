"""The README's steps from and to a bucket, whose server misbehaves: the same bits as from and to folders."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from walk import TINY_UNET, Flow, run_training

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.evaluate import evaluate
from ldmlab.checkpoints import load_checkpoint
from ldmlab.data import shards
from ldmlab.data.manifest import read_manifest
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from s3_server import S3, running_s3


@pytest.fixture(scope="module")
def s3(flow: Flow) -> Iterator[S3]:
    with running_s3() as server:
        server.upload(flow.packed, "packed")
        yield server


@pytest.fixture(autouse=True)
def _own_cache(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDMLAB_SHARDS", str(tmp_path / "shards"))
    shards._FETCHED.clear()
    s3.faults.planted.clear()


DATA = ["data.train=s3://lab/packed/train", "data.val=s3://lab/packed/val"]


def encode(flow: Flow, out: str) -> None:
    options = [*DATA, f"from_run={flow.root}/first_stage", f"out={out}", "data.workers=0"]
    assert cli.dispatch(["encode", "data=shards", *options]) == 0


@pytest.fixture(scope="module")
def latents(flow: Flow, s3: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Latents that were encoded from the bucket into the bucket, while some answers failed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDMLAB_SHARDS", str(tmp_path_factory.mktemp("shards")))
        shards._FETCHED.clear()  # of a test before, whose folder may be gone
        s3.faults.plant("500", "packed/train/train-000000.tar", 2)
        s3.faults.plant("500 PUT", "latents/train/train-000000.tar", 2)
        encode(flow, "s3://lab/latents")
    return "s3://lab/latents"


def test_encoded_in_the_bucket_as_in_a_folder(flow: Flow, latents: str, tmp_path: Path) -> None:
    for split in ("train", "val"):
        there = ShardData(*[f"{latents}/{split}"] * 2, image_size=16).manifest()
        here = read_manifest(flow.root / "latents" / split)
        assert there.hash == here.hash
    encode(flow, str(tmp_path / "folder"))  # from the bucket into a folder
    assert read_manifest(tmp_path / "folder" / "train").hash == read_manifest(flow.root / "latents" / "train").hash


@pytest.mark.slow
def test_the_last_of_several_processes_sends(flow: Flow, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmlab.app.encode_splits.launched", lambda: (1, 2))
    encode(flow, "s3://lab/shared")
    assert not s3.names("shared")
    monkeypatch.setattr("ldmlab.app.encode_splits.launched", lambda: (0, 2))
    encode(flow, "s3://lab/shared")
    assert {"train/manifest.json", "val/manifest.json", "first_stage/model.yaml"} <= s3.names("shared")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_is_resumed_from_the_bucket_bit_for_bit(
    flow: Flow, s3: S3, latents: str, tmp_path: Path, workers: int
) -> None:
    run = tmp_path / "model"
    shutil.copytree(flow.root / "model", run)
    (run / "checkpoints" / "step_00000002.ckpt").unlink()
    (run / "finished.json").unlink()
    for kind in ("cut", "500", "altered", "slow"):
        s3.faults.plant(kind, "latents/train/train-000000.tar", 1)
    given = [f"data.latents={latents}", *DATA, f"conditioner.text.from_run={flow.root}/clip", f"data.workers={workers}"]
    run_training("mine/text_to_image", *given, "data.image_size=16", *TINY_UNET, f"run.dir={run}")
    there, here = (load_checkpoint(f / "checkpoints" / "step_00000002.ckpt") for f in (run, flow.root / "model"))
    for name, state in here["modules"].items():
        for key, value in state.items():
            assert torch.equal(there["modules"][name][key], value), (name, key)
    assert there["data"] == here["data"]


@pytest.mark.slow
def test_a_model_is_scored_against_images_of_the_bucket(flow: Flow, tmp_path: Path) -> None:
    small = ["protocol.samples=8", "protocol.steps=2", "protocol.neighbours=2", "protocol.metrics.kid.subset_size=4"]
    options = [f"model={flow.root}/model", "features=clip_run", f"features.run={flow.root}/clip"]
    results = []
    for number, data in enumerate((DATA, flow.data[:2])):
        out = tmp_path / str(number)
        given = ["data=shards", *data, "data.image_size=16", "data.workers=0", f"out={out}"]
        evaluate(plain(compose("evaluate", [*options, *small, *given, "protocol=images", "device=cpu"])))
        results.append(json.loads((out / "metrics.json").read_text()))
    assert results[0]["scores"] == results[1]["scores"]
    assert results[0]["reference"]["manifest_hash"] == results[1]["reference"]["manifest_hash"]
    assert results[0]["reference"]["folder"].startswith("s3://lab/packed/")


@pytest.mark.slow
def test_a_run_that_names_a_command_is_refused(flow: Flow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "model"
    shutil.copytree(flow.root / "model", run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(flow.packed / "val"), f"pipe:touch {tmp_path}/ran.tar"))
    options = [f"model={run}", "features=clip_run", f"features.run={flow.root}/clip", f"out={tmp_path}/out"]
    monkeypatch.setattr("ldmlab.instantiate._TYPED", set())
    with pytest.raises(InputError, match=r"data.val=.* could run any command; a file may not give it"):
        evaluate(plain(compose("evaluate", [*options, "protocol=images", "device=cpu"])))
    assert not (tmp_path / "ran.tar").exists()
