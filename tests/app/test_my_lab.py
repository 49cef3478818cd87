"""examples/my_lab, installed beside ldmlab as any package is, goes through the whole flow by its commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image
from strange_images import make_folder

import ldmlab

ROOT = Path(__file__).parents[2]
SOURCE = Path(ldmlab.__file__).parents[1]
SEARCH = "hydra.searchpath=[pkg://my_lab.conf]"
PARTS = ["backbone=tiny_dit", "conditioner=caption_length", "callbacks=weight_norm", "first_stage=identity"]
SMALL = [
    *("trainer.micro_batch=4", "trainer.validate_every=4", "trainer.checkpoint_every=2", "trainer.log_every=1"),
    *("trainer.precision=32-true", "trainer.averaging_decay=0.5", "trainer.accelerator=cpu"),
    *("stage.panel_steps=2", "stage.panel_count=2", "backbone.width=32", "backbone.depth=1"),
]


class Lab:
    """Folders of one walk, and the commands in an environment where my_lab is installed, or not."""

    def __init__(self, root: Path) -> None:
        self.root, self.site, self.run = root, root / "site", root / "run"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        copy = root / "source" / "my_lab"  # pip builds inside
        shutil.copytree(ROOT / "examples" / "my_lab", copy, ignore=shutil.ignore_patterns("__pycache__", "build"))
        subprocess.run([*pip, "--target", str(self.site), str(copy)], check=True, capture_output=True)

    def command(self, *words: object, installed: bool = True, code: int = 0) -> subprocess.CompletedProcess[str]:
        paths = [str(self.site)] if installed else []
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), *paths]), "OMP_NUM_THREADS": "1"}
        environment["LDMLAB_REFERENCES"] = str(self.root / "references")
        result = subprocess.run(
            [sys.executable, "-W", "error:::ldmlab", "-m", "ldmlab", *map(str, words)],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == code, result.stdout + result.stderr
        assert "Traceback" not in result.stderr
        return result

    def train(self, steps: int, *more: str) -> None:
        data = ["data=shards", f"data.train={self.root}/packed/train", f"data.val={self.root}/packed/val"]
        options = [*data, "data.image_size=8", "data.fields=[caption]", "data.workers=0", f"run.dir={self.run}"]
        self.command("train", SEARCH, *PARTS, *options, *SMALL, f"trainer.max_steps={steps}", *more)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    made = Lab(tmp_path_factory.mktemp("lab"))
    make_folder(made.root / "images")
    made.command(
        *("pack", made.root / "images", made.root / "packed", "--size", 8, "--val", 0.2, "--workers", 1),
        *("--max-bad", 0.1),
    )
    made.train(2)
    return made


@pytest.mark.slow
def test_it_trains_and_resumes_and_is_recorded(lab: Lab) -> None:
    lab.train(4)
    header, *rows = (lab.run / "metrics.csv").read_text().splitlines()
    assert "weight_norm" in header.split(",")
    assert len(rows) == 4
    description = yaml.safe_load((lab.run / "model.yaml").read_text())
    assert description["backbone"]["_target_"] == "my_lab.backbone.TinyDiT"
    assert description["plugins"] == {"my_lab": "0.1.0"}
    assert json.loads((lab.run / "provenance.json").read_text())["plugins"] == {"my_lab": "0.1.0"}


@pytest.mark.slow
def test_it_evaluates_by_a_metric_of_its_own(lab: Lab) -> None:
    metric = "+metric@protocol.metrics.colour_agreement=colour_agreement"
    few = ["protocol.samples=4", "protocol.steps=2", "protocol.neighbours=0", "~protocol.metrics.precision_recall"]
    words = ["features=mean_colours", *few, metric, "device=cpu", "keep_reference=false", f"out={lab.root}/scores"]
    lab.command("evaluate", SEARCH, f"model={lab.run}", *words)
    score = json.loads((lab.root / "scores" / "metrics.json").read_text())["scores"]["colour_agreement"]
    assert 0 < score["value"] <= 1
    assert score["higher_is_better"] is True
    assert "Colour agreement" in (lab.root / "scores" / "report.html").read_text()


@pytest.mark.slow
def test_it_samples_and_travels(lab: Lab) -> None:
    sample = ["a red circle", "--steps", 2, "--device", "cpu", "--seed", 1]
    lab.command("sample", lab.run, *sample, "--out", lab.root / "of_run")
    lab.command("export", "--without-card", lab.run, lab.root / "model")
    assert yaml.safe_load((lab.root / "model" / "model.yaml").read_text())["plugins"] == {"my_lab": "0.1.0"}
    lab.command("sample", lab.root / "model", *sample, "--out", lab.root / "of_model", "--plugins", "my_lab")
    of_run, of_model = (sorted((lab.root / name).glob("*.png")) for name in ("of_run", "of_model"))
    assert of_run
    assert [Image.open(p).tobytes() for p in of_run] == [Image.open(p).tobytes() for p in of_model]


@pytest.mark.slow
def test_without_the_package_the_way_out_is_said(lab: Lab) -> None:
    words = ["sample", lab.run, "a red circle", "--device", "cpu", "--out", lab.root / "never"]
    sentence = lab.command(*words, installed=False, code=2).stderr
    assert "my_lab.backbone.TinyDiT" in sentence
    assert "pip install my-lab" in sentence
    assert sentence.count("\n") == 1
    again = lab.command("config", "train", SEARCH, installed=False, code=2).stderr
    assert "my_lab" in again


def test_no_file_of_ours_names_it() -> None:
    for folder in ("src", "conf"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                assert "my_lab" not in path.read_text(), path
