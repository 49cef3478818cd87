"""Every shipped experiment composes, says how to run it and what it costs, and builds what it names."""

import pytest
import torch

from ldmlab.app.compose import compose, conf_dir, group_choices, plain
from ldmlab.app.plans import PLANS
from ldmlab.app.wiring import stage_options
from ldmlab.instantiate import instantiate

EXPERIMENTS = group_choices("experiment")
ELSEWHERE = ("paper/", "tradeoff/", "modern/", "equal_flops/")  # test_paper_networks.py and others build them
OURS = [name for name in EXPERIMENTS if not name.startswith(ELSEWHERE)]
GIVEN = ["data.train=nowhere/train", "data.val=nowhere/val"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_opens_with_its_command_and_cost(name: str) -> None:
    head = (conf_dir() / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert head.startswith("# @package _global_\n")
    assert "train.py" in head or "README.md" in head
    assert "# Cost:" in head


def test_an_experiment_names_its_runs() -> None:
    assert compose("train", ["experiment=demo/cpu_clip"]).run.name == "demo-clip"


@pytest.mark.parametrize("name", OURS)
def test_an_experiment_builds(name: str) -> None:
    config = plain(compose("train", [f"experiment={name}", *GIVEN]))
    settings = instantiate(config["trainer"], where="trainer")
    data = instantiate(config["data"], where="data", seed=0)
    for group in ("callbacks", "logger"):
        for key, node in config[group].items():
            instantiate(node, where=f"{group}.{key}")
    options = stage_options(config, settings)
    stage = config["stage"]["name"]
    if stage == "diffusion":  # its latents are not here; the network is
        with torch.device("meta"):
            instantiate(config["backbone"], where="backbone", in_channels=4, out_channels=4, context_width=128)
        instantiate(config["sampler"], where="sampler")
    else:
        plan = PLANS[stage](config, data, options)
        assert plan.spec["image_size"] == data.image_size
        assert plan.stage.groups()
