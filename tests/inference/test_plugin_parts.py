"""Samplers and guiders of a package outside ldmlab, by their full name."""

from pathlib import Path

import pytest

from ldmlab.errors import InputError
from ldmlab.inference.grids import read_settings
from sampling_models import sample_command

PACKAGE = '''
class Slow:
    """Takes the clean estimate as it is at every level."""
    order, steps, spacing = None, 3, "linspace"

    def __init__(self, eta=0.0):
        self.eta = eta

    def __call__(self, denoise, x, grid, *, noise, after_step=None):
        for number, (here, there) in enumerate(zip(grid, grid[1:])):
            clean = denoise(x, here)
            x = there.alpha * clean + there.sigma * noise(number)
            x = x if after_step is None else after_step(number, x, clean)
        return x


class Dim:
    """Halves every clean estimate."""
    reads = frozenset()

    def __init__(self, model, weight=0.5):
        self.weight = weight

    def __call__(self, denoise, batch):
        return lambda x, level: self.weight * denoise(x, level)

    def as_text(self):
        return {"dim": self.weight}


class Empty:
    pass
'''


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "dim_lab.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ldmlab.instantiate._TYPED", set())  # what is typed here is not typed in the next test
    return tmp_path


def test_a_typed_sampler_and_guider_are_trusted(lab: Path) -> None:
    words = ["runs/tiny", "1", "--sampler", "dim_lab.Slow", "--guider", "dim_lab.Dim", "--guider-weight", "0.25"]
    sample_command([*words, "--out", "out"])
    told = read_settings(Path("out/000000.png"))
    assert (told["sampler"], told["steps"], told["spacing"], told["dim"]) == ("dim_lab.Slow", "3", "linspace", "0.25")


@pytest.mark.parametrize("option", ["--sampler", "--guider"])
@pytest.mark.parametrize("name", ["os.system", "dim_lab.Nothing", "no_such_lab.Slow", "dim_lab."])
def test_what_is_no_part_is_refused(lab: Path, option: str, name: str) -> None:
    with pytest.raises(InputError):
        sample_command(["runs/tiny", "1", option, name, "--out", "out"])
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["--sampler", "--guider"])
def test_a_class_that_misses_its_contract_is_refused(lab: Path, option: str) -> None:
    with pytest.raises(InputError, match=r"dim_lab\.Empty"):
        sample_command(["runs/tiny", "1", option, "dim_lab.Empty", "--out", "out"])
