"""The pins of constraints.txt fit each other, so that pip can install the project on a new machine."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

_FILE = Path(__file__).parents[1] / "constraints.txt"
PINS = {
    canonicalize_name(requirement.name): next(iter(requirement.specifier)).version
    for requirement in map(
        Requirement, filter(None, (line.partition("#")[0] for line in _FILE.read_text().split("\n")))
    )
}


def conflicts(name: str) -> list[str]:
    """The requirements of an installed package that its pins refuse, those of extras left out."""
    try:
        requirements = [Requirement(text) for text in distribution(name).requires or []]
    except PackageNotFoundError:  # needed by another Python or system
        return []
    return [
        f"{name} requires {requirement}, but {pinned} is pinned"
        for requirement in requirements
        if (pinned := PINS.get(canonicalize_name(requirement.name)))
        and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
        and not requirement.specifier.contains(pinned, prereleases=True)
    ]


@pytest.mark.parametrize("name", sorted(PINS))
def test_pins_fit_each_other(name):
    assert conflicts(name) == []


def test_a_pin_that_a_package_refuses_is_found(monkeypatch):
    monkeypatch.setitem(PINS, "python-dateutil", "4.0.0")
    assert [
        line for name in PINS for line in conflicts(name) if line.startswith("aiobotocore requires python-dateutil")
    ]
