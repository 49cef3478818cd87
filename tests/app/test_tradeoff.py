"""stage=all: every stage of a factor in one job, nothing made twice, and the denoisers of the comparison alike."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from strange_images import make_folder
from walk import TINY_CLIP

import ldmlab.app.factor_stages as factor_stages
from ldmlab.app import cli
from ldmlab.app.all_stages import train_all_stages
from ldmlab.app.compose import compose, conf_dir, plain
from ldmlab.app.factor_stages import content_key, data_content, once
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.evaluation.flops import denoiser_cost
from ldmlab.instantiate import instantiate

FACTORS = ("f1", "f2", "f4", "f8", "f16", "f32")
TINY = [
    *("first_stage.channels=8", "first_stage.norm_groups=4", *TINY_CLIP),
    *("backbone.model_channels=32", "backbone.channel_mult=[1]", "backbone.attention_downsampling=[]"),
    *("trainer.max_steps=2", "trainer.micro_batch=8", "trainer.log_every=1", "trainer.validate_every=2"),
    *("trainer.precision=32-true", "trainer.accelerator=cpu", "logger=csv", "data.workers=0", "data.cache=false"),
    *(f"stage.{part}.trainer.{o}" for part in ("first_stage", "clip") for o in ("max_steps=2", "micro_batch=8")),
    *(f"stage.{part}.trainer.{o}" for part in ("first_stage", "clip") for o in ("accelerator=cpu", "log_every=1")),
    *("stage.denoiser.stage.panel_steps=2", "stage.denoiser.stage.panel_count=2"),
    *("stage.evaluation.points=2", "stage.evaluation.speed_steps=[1,2]", "stage.evaluation.protocol.steps=2"),
    *("stage.evaluation.protocol.samples=8", "stage.evaluation.protocol.shown=2"),
    *("stage.evaluation.protocol.metrics.kid.subset_size=4", "stage.evaluation.reconstruction.shown=2"),
    *("stage.evaluation.reconstruction.metrics.kid.subset_size=4", "stage.evaluation.batch_size=8"),
]


def _config(*options: str, recipe: str = "emoji") -> dict:
    return plain(compose("train", [f"experiment=tradeoff/{recipe}", *options]))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stranger's images as shards."""
    root = tmp_path_factory.mktemp("tradeoff")
    make_folder(root / "images")
    options = ["--size", "16", "--val", "0.2", "--stratify", "kind", "--workers", "1", "--max-bad", "0.1"]
    assert cli.dispatch(["pack", str(root / "images"), str(root / "packed"), *options]) == 0
    return root


def _options(root: Path) -> list[str]:
    data = [f"data.train={root}/packed/train", f"data.val={root}/packed/val", "data.image_size=16", "data.balance=null"]
    return [*data, "data.fields=[caption]", f"paths.runs={root}/runs", *TINY]


@pytest.mark.slow
def test_two_factors_train_once_each_and_stand_in_one_report(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[str] = []
    encoded: list[str] = []
    train, encode = factor_stages.train, factor_stages.encode_splits

    def counted_train(config: dict, resume: str) -> None:
        trained.append(config["stage"]["name"])
        train(config, resume)

    def counted_encode(config: dict) -> None:
        encoded.append(config["out"])
        encode(config)

    monkeypatch.setattr(factor_stages, "train", counted_train)
    monkeypatch.setattr(factor_stages, "encode_splits", counted_encode)
    jobs = [_config(*_options(packed), f"first_stage={f}") for f in ("f2", "f4")]
    parts = [train_all_stages(config) for config in jobs]
    assert trained == ["autoencoder", "clip", "diffusion", "autoencoder", "diffusion"]  # one CLIP for both
    assert len(encoded) == 2

    again = [train_all_stages(config) for config in jobs]
    assert [p.denoiser for p in again] == [p.denoiser for p in parts]
    assert len(trained) == 5
    assert len(encoded) == 2

    seeded = train_all_stages(_config(*_options(packed), "first_stage=f4", "seed=1"))
    assert trained[5:] == ["diffusion"]  # another seed takes up the first stage and its latents
    assert seeded.latents == parts[1].latents

    record = json.loads((parts[1].denoiser / "tradeoff.json").read_text())
    assert [(p["step"], p["sampler_steps"]) for p in record["points"]] == [(1, 2), (2, 2), (2, 1)]
    assert record["points"][1]["flops"] == 2 * record["points"][0]["flops"] == 2 * 8 * record["training"]
    assert record["seconds_per_image"].keys() == {"1", "2"}
    assert record["reconstruction"]["psnr"]["value"] > 0
    folders = [str(path) for path in sorted((packed / "runs").glob("tradeoff*"))]
    assert len(folders) == 3
    assert cli.dispatch(["report", *folders]) == 0
    page = (packed / "runs" / "comparison" / "report.html").read_text()
    assert page.count("<svg") >= 8
    assert "f4" in page
    rows = list(csv.DictReader((packed / "runs" / "comparison" / "points.csv").open()))
    assert len(rows) == 9
    assert "±" in (packed / "runs" / "comparison" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "size", "digits"), [("emoji", "", 1), ("emoji_cpu", "_small", 2)])
def test_every_factor_builds_with_equal_parameters(recipe: str, size: str, digits: int) -> None:
    counted = {}
    for name in (factor + size for factor in FACTORS):
        config = _config(f"first_stage={name}", recipe=recipe)
        first_stage = instantiate(config["first_stage"], where="first_stage")
        f = first_stage.downsampling
        assert name == f"f{f}{size}"
        latent = LatentSpec(first_stage.latent_channels, 128 // f, 128 // f, f)
        node = {**config["backbone"], "in_channels": latent.channels, "out_channels": latent.channels}
        cost = denoiser_cost(node, latent, {})
        counted[name] = cost.parameters
        header = (conf_dir() / "backbone" / f"unet_tradeoff_{name}.yaml").read_text().split(";")[0]
        assert f"{cost.parameters / 1e6:.{digits}f} M parameters" in header
    assert max(counted.values()) <= 1.05 * min(counted.values())


@pytest.mark.slow
def test_a_compute_budget_decides_the_steps() -> None:
    steps = {}
    for name in ("f1", "f16"):
        factor = factor_stages.Factor(_config(f"first_stage={name}", "stage.compute_budget=0.01"))
        assert factor.max_steps * factor.images_per_step * factor.cost.training <= 0.01e18
        assert (factor.max_steps + 1) * factor.images_per_step * factor.cost.training > 0.01e18
        steps[name] = factor.max_steps
    assert steps["f16"] > 10 * steps["f1"]
    with pytest.raises(InputError, match=r"stage\.compute_budget=1e-09"):
        _ = factor_stages.Factor(_config("stage.compute_budget=1e-9")).max_steps


@pytest.mark.parametrize("option", ["run.dir=somewhere", "init_from=somewhere", "data.latents=somewhere"])
def test_what_names_a_folder_is_refused(option: str) -> None:
    with pytest.raises(InputError, match=option.split("=")[0]):
        train_all_stages(_config(option))


def test_a_key_follows_the_images_and_not_their_place() -> None:
    config = _config()
    data = instantiate(config["data"], where="data", seed=0)
    here = data_content(config["data"], data)
    assert content_key(here) == content_key(
        data_content({**config["data"], "train": "elsewhere", "workers": 7, "states": False}, data)
    )
    assert content_key(here) != content_key(data_content({**config["data"], "image_size": 64}, data))


def test_what_fails_is_made_again(tmp_path: Path) -> None:
    made = []

    def fail() -> None:
        made.append("broken")
        raise InputError("no")

    with pytest.raises(InputError, match="no"):
        once(tmp_path / "part", "mark", fail)

    def finish() -> None:
        (tmp_path / "part").mkdir()
        (tmp_path / "part" / "mark").write_text("")

    assert once(tmp_path / "part", "mark", finish)
    assert not once(tmp_path / "part", "mark", finish)


def test_a_job_under_hydras_command_line_composes_again() -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        running = GlobalHydra.instance().hydra
        assert compose("evaluate", ["model=given"]).model == "given"
        assert GlobalHydra.instance().hydra is running


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_part_that_another_job_makes_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = [sys.executable, "-c", HOLD, str(tmp_path / ".part.lock")]
    with subprocess.Popen(job, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"

        def finish_the_other(seconds: float) -> None:
            (tmp_path / "part").mkdir()
            (tmp_path / "part" / "mark").write_text("")
            other.communicate()

        monkeypatch.setattr("ldmlab.app.factor_stages.time.sleep", finish_the_other)
        assert not once(tmp_path / "part", "mark", lambda: pytest.fail("made a second time"))
    assert "waiting for it" in capsys.readouterr().err
