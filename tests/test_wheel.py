"""The built wheel holds all it needs: configuration, the paper's tables, templates, commands."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's content, as an installation would lay it out."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        wheel.extractall(out / "site")
    return out / "site"


def test_every_file_travels(unpacked: Path) -> None:
    for folder, inside in (("src/ldmlab", "ldmlab"), ("src/hydra_plugins", "hydra_plugins"), ("conf", "ldmlab/conf")):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:  # templates and tables too
                assert (unpacked / inside / path.relative_to(ROOT / folder)).exists(), path


def test_it_composes_a_run_away_from_the_checkout(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import ldmlab; from ldmlab.app.compose import compose, conf_dir; print(conf_dir());"
        "print(compose('train', ['experiment=mine/clip']).stage.name)"
    )
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    folder, stage = result.stdout.split()
    assert Path(folder) == unpacked / "ldmlab" / "conf"
    assert stage == "clip"


@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_the_verbs_are_there_away_from_the_checkout(unpacked: Path, tmp_path: Path, verb: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "ldmlab", verb, "--cfg", "job", "--package", "paths"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "runs: runs" in result.stdout


@pytest.mark.slow
def test_it_prints_a_table_of_the_paper_as_a_page(unpacked: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    command = [sys.executable, "-m", "ldmlab", "report", "--format", "html", "--table", "layout/coco-256"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "<td>40.91</td>" in result.stdout
