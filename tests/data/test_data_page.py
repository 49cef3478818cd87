"""The page on data packs every set that an experiment of the paper reads."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "data" / "README.md").read_text().replace("\\\n", " ")
PACKS = re.findall(r"^ldmlab pack \S+ data/(\S+) (.*)$", PAGE, re.M)
FOLDERS = sorted(
    {
        folder
        for path in (ROOT / "conf" / "experiment" / "paper").rglob("*.yaml")
        for folder in re.findall(r"\$\{paths\.data\}/(\S+/(?:train|val))", path.read_text())
    }
)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_set_of_the_paper_is_packed(folder: str) -> None:
    name, split = folder.split("/")
    commands = [options for packed, options in PACKS if packed == name]
    if split == "val":
        assert any("--split val" in options or "--val " in options for options in commands)
    else:
        assert any("--split" not in options for options in commands)


def test_there_are_sets() -> None:
    assert len(FOLDERS) > 20
