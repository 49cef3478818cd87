"""Every file of a group whose parts stand alone is built and held to the group's contract; new files are found."""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ldmlab.app.compose import compose, conf_dir, group_choices, plain
from ldmlab.checkpoints import without_weights
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, instantiate
from ldmlab.part_checks import CONTRACTS, check_part, members


class Patches(nn.Module):
    """Stands for a frozen encoder."""

    width = 8


DERIVED: dict[str, dict[str, Any]] = {  # what wiring hands over
    "backbone": {"in_channels": 4, "out_channels": 4, "context_width": 512, "vector_width": None},
    "optimizer": {"global_batch": 8},
    "lr_schedule": {"max_steps": 10},
    "data": {"seed": 0},
    "first_stage": {"encoder": Patches()},
}
GROUPS = ["backbone", "first_stage", "sampler", "optimizer", "lr_schedule", "data"]
FILES = [(group, name) for group in GROUPS for name in group_choices(group) if not name.startswith("_")]
ONCE = plain(compose("train", ["data.train=x", "data.val=x"]))


def node_of(group: str, name: str) -> dict[str, Any]:
    """The group's node; only the group's own file is composed where it inherits from others."""
    text = (conf_dir() / group / f"{name}.yaml").read_text()
    if "defaults:" not in text and "${" not in text and "???" not in text:
        from omegaconf import OmegaConf

        node = OmegaConf.to_container(OmegaConf.create(text))
        assert isinstance(node, dict)
        return {str(key): value for key, value in node.items()}
    given = [f"data.{key}=x" for key in ("train", "val")]
    return plain(compose("train", [f"{group}={name}", *given, "data.image_size=8"]))[group]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: str(value))
def test_a_file_keeps_its_contract(group: str, name: str) -> None:
    node = node_of(group, name)
    derived = {k: v for k, v in DERIVED.get(group, {}).items() if accepts(node, k, where=group) and k not in node}
    with without_weights():
        part = instantiate(node, where=group, trust=True, **derived)
    check_part(part, CONTRACTS[group], group, name)


def test_every_group_is_a_folder_or_lies_in_one() -> None:
    folders = {path.name for path in Path(conf_dir()).iterdir() if path.is_dir()}
    of_diffusion = ("schedule", "prediction", "time_sampling", "weighting", "diffusion_loss")
    inside = {**dict.fromkeys(of_diffusion, "diffusion"), "guider": "guiders"}
    assert {inside.get(group, group) for group in CONTRACTS} <= folders


@pytest.mark.parametrize("group", CONTRACTS)
def test_an_empty_part_is_refused_with_all_it_lacks(group: str) -> None:
    methods, attributes = members(CONTRACTS[group])
    assert methods or attributes
    with pytest.raises(InputError) as caught:
        check_part(object(), CONTRACTS[group], group, "a.Part")
    lacking = [f"{name}()" for name in methods if name != "__init__"]
    assert all(name in str(caught.value) for name in [*lacking, *attributes])
