"""Every choice of this room's configuration groups builds."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from ldmlab.app.compose import compose, plain
from ldmlab.evaluation.protocol import Protocol
from ldmlab.instantiate import accepts, instantiate, locate
from ldmlab.training.callbacks.scores import Scores
from ldmlab.training.settings import trainer_node

CONF = Path(__file__).parents[2] / "conf"
DERIVED: dict[str, dict[str, Any]] = {
    "optimizer": {"global_batch": 8},
    "lr_schedule": {"max_steps": 100},
    "trainer": {},
}
SINGLE = [path for group in DERIVED for path in sorted((CONF / group).glob("*.yaml"))]
SEVERAL = [path for group in ("callbacks", "logger") for path in sorted((CONF / group).glob("*.yaml"))]
BUILT_AROUND = {"every": 10, "monitor": "fid"}  # of a callback to which wiring gives a scorer


@pytest.mark.parametrize("path", SINGLE, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_choice_builds(path: Path) -> None:
    group = path.parent.name
    config = plain(compose("train", [f"{group}={path.stem}"]))[group]
    if group == "trainer":
        config = trainer_node(config)
    assert instantiate(config, where=group, trust=True, **DERIVED[group]) is not None


def test_scores_in_training_bring_all_their_choices() -> None:
    options = ["callbacks=scores", "callbacks.scores.features.run=runs/clip"]
    node = plain(compose("train", options))["callbacks"]["scores"]
    assert isinstance(instantiate(node["protocol"], where="protocol"), Protocol)
    assert locate(node, where="callbacks.scores") is Scores
    assert {"fid", "kid"} <= node["protocol"]["metrics"].keys()


@pytest.mark.parametrize("path", SEVERAL, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_set_builds(path: Path) -> None:
    group = path.parent.name
    intervals = {"trainer": {"validate_every": 5, "checkpoint_every": 5}}
    composed = OmegaConf.merge(intervals, compose(f"{group}/{path.stem}", []))
    for name, node in OmegaConf.to_container(composed, resolve=True).get(group, {}).items():
        where = f"{group}.{name}"
        if accepts(node, "scorer", where=where):
            assert instantiate({"_target_": node["_target_"], **BUILT_AROUND}, where=where, scorer=object())
        else:
            assert instantiate(node, where=where, trust=True) is not None
