"""`ldmlab first-stage`: a sheet with every measure and a denoiser of equal cost, and what it refuses."""

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from ldmlab.app import cli
from ldmlab.app.compose import compose, plain
from ldmlab.app.conf_files import chosen_options, without_size
from ldmlab.app.evaluate import check_read, evaluate
from ldmlab.app.first_stage_sheet import patch_size
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import write_model_folder

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from blobs import SIZE, write_blobs

SMALL = {"channels": 8, "num_res_blocks": 1, "mid_attention": False, "norm_groups": 4}
KL = {"_target_": "ldmlab.first_stages.kl.KLAutoencoder", "channel_mult": [1, 2], "latent_channels": 2, **SMALL}
VQ = {"_target_": "ldmlab.first_stages.vq.VQModel", "channel_mult": [1, 1, 1], "latent_channels": 2, **SMALL}
PIXELS = {"_target_": "ldmlab.first_stages.identity.Identity"}


def first_stage(folder: Path, node: dict) -> str:
    """An untrained first stage as a model folder."""
    torch.manual_seed(0)
    module = instantiate(node, where="first_stage")
    spec = {"kind": "first_stage", "image_size": SIZE, "first_stage": node}
    write_model_folder(folder, spec, {"first_stage": module.state_dict()} if module.state_dict() else {})
    return str(folder)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options of a sheet of a few blobs, which are also the data of the run `tmp_path`/pixels."""
    monkeypatch.setenv("LDMLAB_REFERENCES", str(tmp_path / "references"))
    write_blobs(tmp_path / "train", range(40))
    write_blobs(tmp_path / "val", range(100, 112))
    folders = {name: str(tmp_path / name) for name in ("train", "val")}
    node = {"_target_": "ldmlab.data.shard_data.ShardData", **folders, "image_size": SIZE, "fields": [], "workers": 0}
    (tmp_path / "pixels").mkdir()
    (tmp_path / "pixels" / "config.yaml").write_text(json.dumps({"data": node}))
    data = ["data=shards", *(f"data.{name}={folder}" for name, folder in folders.items()), "data.workers=0"]
    features = ["--features", "pixels", "features.pixels.side=2", "--device", "cpu", "--batch-size", "8"]
    return [*data, *features, "--out", str(tmp_path / "sheets")]


@pytest.mark.slow
def test_a_sheet_of_pixels_and_of_codes(tmp_path: Path, options: list[str]) -> None:
    """The identity loses nothing, in numbers that JSON knows; codes are counted; a run knows its data."""
    models = [first_stage(tmp_path / "pixels", PIXELS), first_stage(tmp_path / "vq", {**VQ, "codebook_size": 16})]
    own = [word for word in options if not word.startswith("data")]
    assert cli.dispatch(["first-stage", models[0], *own, "--without-generation"]) == 0
    assert cli.dispatch(["first-stage", *models, *options, "--without-generation"]) == 0
    pixels, codes = (json.loads(path.read_text()) for path in sorted((tmp_path / "sheets").glob("*/sheet.json")))
    assert pixels["reconstruction"]["pixels"]["scores"]["psnr"]["value"] == 100
    assert pixels["smoothness"]["equivariance"]["half_size"] == {"encoder": 0, "decoder": 0}
    assert pixels["spectrum"]["latents"]["power"] == pytest.approx(pixels["spectrum"]["images"]["power"])
    assert pixels["codebook"] is None
    assert codes["model"]["latent"] == [2, 4, 4]
    assert 0 < codes["codebook"]["bits"] <= codes["codebook"]["most_bits"] == 4
    rows = list(csv.DictReader((tmp_path / "sheets" / "sheets.csv").open()))
    assert rows[0]["reconstruction psnr"] == "100.0"
    assert [bool(row["codebook_use"]) for row in rows] == [False, True]


@pytest.mark.slow
def test_denoisers_of_equal_cost(tmp_path: Path, options: list[str]) -> None:
    models = [first_stage(tmp_path / name, node) for name, node in (("kl", KL), ("vq", {**VQ, "codebook_size": 16}))]
    words = ["first-stage", *models, *options, "--generation-steps", "2", "--seeds", "2", "--samples", "16"]
    assert cli.dispatch(words) == 0
    kl, vq = (json.loads(path.read_text()) for path in sorted((tmp_path / "sheets").glob("*/sheet.json")))
    assert [one["patch_size"] for one in kl["generation"] + vq["generation"]] == [1] * 4
    assert [one["steps"] for one in (kl["generation"][0], vq["generation"][0])] == [2, 8]  # 64 and 16 tokens
    assert vq["generation"][0]["flops"] == pytest.approx(kl["generation"][0]["flops"], rel=0.1)
    scores = [one["evaluations"]["pixels"]["scores"]["fid"]["value"] for one in kl["generation"]]
    assert scores[0] != scores[1] > 0
    page = (tmp_path / "sheets" / "report.html").read_text()
    assert "2 of them trained" in page
    before = sorted(path for path in (tmp_path / "sheets").rglob("*.ckpt"))
    assert cli.dispatch(words) == 0  # nothing is trained again
    assert sorted(path for path in (tmp_path / "sheets").rglob("*.ckpt")) == before


def test_patches_make_eight_by_eight_tokens_where_they_can() -> None:
    sides = {64: 8, 32: 4, 24: 3, 20: 2, 16: 2, 8: 1, 4: 1, 7: 1}
    assert {side: patch_size(LatentSpec(4, side, side, 4)) for side in sides} == sides


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["features.pixels.side=8"], "needs a MODEL"),
        (["run", "--features", "pixel"], "--features=pixel is unknown"),
        (["run", "--images", "1"], "--images 1 must be at least 2"),
        (["run", "--generation-steps", "0"], "--generation-steps 0"),
        (["run", "--seeds", "0"], "--seeds 0"),
        (["mistyped"], "mistyped is neither a folder nor a checkpoint"),
    ],
)
def test_bad_options_are_refused(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        cli.dispatch(["first-stage", *words])
    assert not list(tmp_path.iterdir())


def test_data_must_be_known(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="records no data"):
        cli.dispatch(["first-stage", first_stage(tmp_path / "kl", KL), "--features", "pixels"])


def test_a_first_stage_is_scored_at_its_own_size_or_the_protocols(tmp_path: Path, options: list[str]) -> None:
    data = [word for word in options if word.startswith("data")]
    words = [f"model={first_stage(tmp_path / 'kl', KL)}", *data, "features=pixels", "features.side=2", "device=cpu"]
    words += ["protocol=paper_first_stage", "~protocol.metrics.is", "protocol.metrics.fid.small_sample=true"]
    for more, size in (([], SIZE), ([f"+protocol.image_size={2 * SIZE}"], 2 * SIZE)):
        chosen = [*words, *more, f"out={tmp_path / str(size)}"]
        config = plain(without_size(compose("evaluate", chosen)))
        check_read(config, chosen_options(chosen))
        evaluate(config)
        assert json.loads((tmp_path / str(size) / "metrics.json").read_text())["sampling"]["size"] == size
