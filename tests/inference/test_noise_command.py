"""`ldmlab noise` saves a grid with a row for each scale and refuses values outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmlab import build
from ldmlab.app.cli import Parser
from ldmlab.app.commands import noise
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.errors import InputError
from sampling_models import tiny_model


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = tiny_model(None)
    model.diffusion.latent_scale = LatentScale(0.1)
    monkeypatch.setattr(build, "load", lambda path, device: model)
    pixels = np.random.default_rng(0).integers(0, 256, (21, 35, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")

    def run(*words: str) -> None:
        parser = Parser()
        noise.add_arguments(parser)
        out = ["--out", str(tmp_path / "sheets" / "noise.png")]
        noise.run(parser.parse_intermixed_args(["model", str(tmp_path / "image.png"), *words, *out]))

    return run


def test_a_row_for_each_scale(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("--scale", "none", "20", "--times", "0,500,999")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == ["scale as trained", "scale none", "scale 20"]
    variances = [float(line.split("variance ")[1].split(";")[0]) for line in lines[:3]]
    assert variances[0] == pytest.approx(100 * variances[1], rel=0.3)  # divided by 0.1; printed with two digits
    assert variances[2] == pytest.approx(4 * variances[0], rel=0.01)
    tall = Image.open(tmp_path / "sheets" / "noise.png")
    command("--times", "0,500,999")
    assert Image.open(tmp_path / "sheets" / "noise.png").height < tall.height


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "half"], "--scale half is not a factor"),
        (["--scale", "0"], "--scale 0 must be above zero"),
        (["--scale", "nan"], "--scale nan must be above zero"),
        (["--times", "0,1000"], "times of the schedule, 0 .. 999"),
        (["--times", "1.5"], "times of the schedule, 0 .. 999"),
        (["--seed", "-1"], "seed=-1"),
    ],
)
def test_refused(command: Any, words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command(*words)


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    for name in ("noise.xyz", "noise", "."):
        parser = Parser()
        noise.add_arguments(parser)
        with pytest.raises(InputError, match="is not an image file"):
            noise.run(parser.parse_intermixed_args(["model", "image.png", "--out", str(tmp_path / name)]))
