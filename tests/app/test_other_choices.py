"""Options of a backbone, schedule, sampler, conditioner or first stage stand in its file: any other can be chosen."""

import pytest
import torch
import yaml

from ldmlab.app.compose import compose, conf_dir, group_choices, plain
from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.plans import sized_backbone
from ldmlab.contracts import LatentSpec
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.first_stages.identity import Identity
from ldmlab.instantiate import instantiate

GROUPS = ("backbone", "diffusion", "sampler", "conditioner", "first_stage")
EXPERIMENTS = group_choices("experiment")
DATA = ["data.train=nowhere/train", "data.val=nowhere/val"]
PUBLISHED = ("image", "image_vit_l_14", "text", "text_transformer", "text_transformer_640")  # need weights or words
PUBLISHED = (*PUBLISHED, "text_vit_h_14", "text_vit_l_14", "text_emoji", "text_sd3")
PUBLISHED = (*PUBLISHED, "frozen_f16", "frozen_f8_small")  # need an encoder
TEACHER = {  # whose path and prediction a distilled model gets
    "schedule": {"_target_": "ldmlab.diffusion.schedule.Schedule"},
    "prediction": {"_target_": "ldmlab.diffusion.parameterization.EpsPrediction"},
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_sets_no_option_of_a_choice(name: str) -> None:
    node = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text())
    assert not node.keys() & set(GROUPS)


def others(number: int) -> dict[str, str]:
    """Another choice of every group for each experiment, so that all choices meet some experiment."""
    choices = {group: [name for name in group_choices(group) if name not in PUBLISHED] for group in GROUPS}
    return {group: names[number % len(names)] for group, names in choices.items()}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder of conf with a part of each group that has none of the options of ours."""
    folder = tmp_path_factory.mktemp("conf")
    for group in GROUPS:
        (folder / group).mkdir()
        (folder / group / "theirs.yaml").write_text("_target_: mylab.Part\n")
    return [f"hydra.searchpath=[file://{folder}]", *(f"{group}=theirs" for group in GROUPS)]


def rounds() -> int:
    """Experiments after which every choice of every group has met one."""
    return max(len(group_choices(group)) for group in GROUPS)


@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=[] if n < rounds() else pytest.mark.slow) for n in range(len(EXPERIMENTS))],
    ids=EXPERIMENTS.__getitem__,
)
def test_another_choice_builds(number: int) -> None:
    name = EXPERIMENTS[number]
    chosen = [f"{group}={choice}" for group, choice in others(number).items()]
    if name.startswith("tradeoff/"):
        chosen = [choice for choice in chosen if not choice.startswith("first_stage=")]  # names the backbone there
        chosen.append("data.image_size=64")  # the sheet of a first stage gives it
    config = plain(compose("train", [f"experiment={name}", *chosen, *DATA]))
    latent = LatentSpec(channels=4, height=32, width=32, downsampling=4)
    with torch.device("meta"):
        instantiate(config["first_stage"], where="first_stage")
        conditioners, _ = build_conditioners(config["conditioner"], latent)
        sized = sized_backbone(config["backbone"], latent, conditioners)
        if config["backbone"]["_target_"].endswith(".MMDiT"):  # which has no form without tokens
            sized["context_width"] = sized["context_width"] or 64
        if not config["backbone"].get("project_vector", True):  # takes vectors of its own width alone
            sized["vector_width"] = config["backbone"]["width"]
        instantiate(sized, where="backbone")
    instantiate(config["sampler"], where="sampler")
    parts = {"latent_scale": LatentScale(), "conditioners": {}, "guidance_trained": True}
    backbone = Identity()
    backbone.accepts = frozenset({"numbers"})  # type: ignore[assignment]
    node = {**({} if "schedule" in config["diffusion"] else TEACHER), **config["diffusion"]}
    instantiate(node, where="diffusion", first_stage=Identity(), backbone=backbone, **parts)


@pytest.mark.parametrize("name", EXPERIMENTS[:: len(EXPERIMENTS) // 8])
def test_a_part_from_outside_needs_none_of_our_options(name: str, outside: list[str]) -> None:
    config = compose("train", [f"experiment={name}", *outside])
    assert all(config[group] == {"_target_": "mylab.Part"} for group in ("backbone", "diffusion", "sampler"))
