"""Files of format 1 mean today what they meant then."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ldmlab import format1
from ldmlab.diffusion.schedule import Schedule
from ldmlab.instantiate import instantiate
from ldmlab.model_files import FORMAT_VERSION, read_description, write_description

SCHEDULE = "ldmlab.diffusion.schedule.Schedule"
ENDS = {"start": 0.0015, "end": 0.0195, "steps": 40}


@pytest.mark.parametrize(
    ("then", "first_third_last"),  # betas as ldmlab 0.1 computed them
    [
        ({"name": "linear"}, (0.0015, 0.00523703, 0.0195)),
        ({}, (0.0015, 0.00523703, 0.0195)),
        ({"name": "sqrt_linear"}, (0.0015, 0.0015 + 0.018 * 13 / 39, 0.0195)),
        ({"name": "sqrt"}, (0.0015**0.5, 0.0075**0.5, 0.0195**0.5)),
    ],
)
def test_a_schedule_keeps_its_betas(tmp_path: Path, then: dict[str, Any], first_third_last: tuple[float, ...]) -> None:
    others = {"kind": "classifier", "image_size": 16, "classifier": {}, "latent_scale": {}}
    spec = {"format_version": 1, **others, "schedule": {"_target_": SCHEDULE, **ENDS, **then}}
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(spec))
    node = read_description(tmp_path)["schedule"]
    schedule: Schedule = instantiate(node, where="schedule")
    assert schedule.betas[[0, 13, 39]].tolist() == pytest.approx(first_third_last, rel=1e-5)
    write_description(tmp_path, {**others, "schedule": node})
    assert read_description(tmp_path)["schedule"] == node  # not translated a second time
    assert read_description(tmp_path)["format_version"] == FORMAT_VERSION


def test_an_alias_means_what_it_meant() -> None:
    assert torch.equal(Schedule("sqrt_linear").betas, Schedule("linear").betas)
    assert Schedule("sqrt_linear").name == "linear"


def test_nodes_are_translated_wherever_they_lie() -> None:
    inner = {"_target_": SCHEDULE, "name": "linear"}
    found = format1.node({"list": [inner], "deep": {"deeper": inner}, "name": "linear"})
    now = {"_target_": SCHEDULE, "name": "scaled_linear"}
    assert found == {"list": [now], "deep": {"deeper": now}, "name": "linear"}


def test_a_curve_over_the_guidance_scale_is_a_sweep() -> None:
    """As evaluations of the version before wrote it."""
    points = [{"guidance_scale": scale, "scores": {}} for scale in (1.0, 2.0)]
    old = {"protocol": {"name": "p", "guidance_scale_curve": [1.0, 2.0]}, "guidance_scale_curve": points}
    new = format1.record(old)
    assert new == {"protocol": {"name": "p", "sweep": {"guidance_scale": [1.0, 2.0]}}, "sweep": points}
    assert format1.record({"protocol": {"guidance_scale_curve": []}, "guidance_scale_curve": []}) == {"protocol": {}}
