"""Every choice of this room's configuration groups builds."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldmlab.instantiate import instantiate

CONF = Path(__file__).parents[2] / "conf"
DERIVED: dict[str, dict[str, Any]] = {
    "optimizer": {"global_batch": 8},
    "lr_schedule": {"max_steps": 100},
    "trainer": {},
}
SINGLE = [path for group in DERIVED for path in sorted((CONF / group).glob("*.yaml"))]
SEVERAL = [path for group in ("callbacks", "logger") for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.mark.parametrize("path", SINGLE, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_choice_builds(path: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(path))
    group = path.parent.name
    assert instantiate(config, where=group, **DERIVED[group]) is not None


@pytest.mark.parametrize("path", SEVERAL, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_set_builds(path: Path) -> None:
    config = OmegaConf.to_container(
        OmegaConf.merge({"trainer": {"validate_every": 5}}, OmegaConf.load(path)), resolve=True
    )
    for name, node in config.items():
        if name != "trainer":
            assert instantiate(node, where=f"{path.parent.name}.{name}") is not None
