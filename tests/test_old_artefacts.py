"""What the version before wrote loads, resumes, samples and trains as it did then."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

import ldmlab
from format1_artefacts import EXPECTED, config_of, unpack
from ldmlab import format1
from ldmlab.app.wiring import train
from ldmlab.build import load_first_stage
from ldmlab.checkpoints import load_checkpoint


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(unpack(tmp_path))
    return tmp_path


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def processor() -> str:
    """Vendor, family and model, which choose the kernels of oneDNN and MKL; empty where Linux does not tell."""
    file = Path("/proc/cpuinfo")
    lines = (
        dict(line.split("\t: ", 1) for line in file.read_text().splitlines() if "\t: " in line) if file.exists() else {}
    )
    found = {name.strip(): value for name, value in lines.items()}
    return " ".join(found.get(name, "") for name in ("vendor_id", "cpu family", "model"))


def resumed(run: str) -> list[dict[str, str]]:
    config = config_of(Path(run))
    config["trainer"]["max_steps"] = 6
    train(config)
    return rows(Path(run))


@pytest.mark.parametrize("run", ["first_stage", "model"])
def test_a_run_goes_on_as_it_would_have_then(run: str, old: Path) -> None:
    table = {row["step"]: row for row in resumed(run)}
    compared = 0
    for row in EXPECTED[run]["rows"]:
        for name, text in row.items():
            if text:
                assert float(table[row["step"]][format1.metric(name)]) == pytest.approx(float(text), rel=1e-4), name
                compared += 1
    assert compared > 15
    content = load_checkpoint(old / run / "checkpoints" / "step_00000006.ckpt")
    known = EXPECTED[run]["modules_sha256"].get(processor())
    if known and torch.__version__ == EXPECTED[run]["torch"] and torch.get_num_threads() == 1:  # the same kernels
        digest = hashlib.sha256()
        for module in content["modules"].values():
            for name in sorted(module):
                digest.update(module[name].contiguous().numpy().tobytes())
        assert digest.hexdigest() == known


@pytest.mark.parametrize("run", ["first_stage", "model"])
def test_the_table_goes_on_under_one_name_a_column(run: str, old: Path) -> None:
    before = rows(Path(run))
    after = resumed(run)
    assert [row["step"] for row in after] == ["1", "2", "3", "4", "5", "6"]
    assert not [name for name in after[0] if name != format1.metric(name)]
    for was, now in zip(before, after, strict=False):
        assert {format1.metric(name): text for name, text in was.items() if text} == {k: v for k, v in now.items() if v}


def test_a_model_folder_gives_the_same_images(old: Path) -> None:
    model = ldmlab.load("exported")
    images = torch.as_tensor(model.sample(class_id=[0, 1], steps=4, guidance_scale=2.0, seed=1))
    expected = EXPECTED["sample"]
    assert list(images.shape) == expected["shape"]
    torch.testing.assert_close(
        images.double().mean((1, 2)), torch.tensor(expected["mean"], dtype=torch.float64), rtol=0, atol=0.05
    )
    kept = np.load(Path(__file__).parent / "assets" / "format1" / "sample.npy")
    assert np.abs(images.numpy().astype(int) - kept).max() <= 1  # rounding of other kernels
    if torch.get_num_threads() == 1 and torch.backends.cpu.get_cpu_capability() == "AVX2":  # the same kernels
        assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == expected["sha256"]


@pytest.mark.parametrize("source", ["model", "model/checkpoints/step_00000004.ckpt", "exported"])
def test_runs_checkpoints_and_model_folders_load(source: str, old: Path) -> None:
    assert ldmlab.load(source).image_size == (16, 16)


@pytest.mark.parametrize("source", ["first_stage", "latents", "model", "exported"])
def test_first_stages_of_each_kind_of_folder_are_the_same(source: str, old: Path) -> None:
    loaded = load_first_stage(source)
    assert loaded.module.downsampling == 2
    assert (loaded.fingerprint == load_first_stage("latents").fingerprint) == (source != "first_stage")  # patterned


def test_latent_shards_train_a_new_run(old: Path) -> None:
    config = config_of(Path("model"))
    config["run"] = {**config["run"], "dir": "new"}
    config["trainer"]["max_steps"] = 2
    train(config)
    assert [row["step"] for row in rows(Path("new"))] == ["1", "2"]
