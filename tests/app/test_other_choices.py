"""Options of a part stand in its file, or in every file of its group: with any experiment another can be chosen."""

from collections.abc import Iterator

import pytest
import torch
import yaml

from ldmlab.app.compose import compose, conf_dir, group_choices, plain
from ldmlab.app.conditioning import build_conditioners
from ldmlab.app.conf_files import check_choices, groups, leaves
from ldmlab.app.plans import sized_backbone
from ldmlab.contracts import LatentSpec
from ldmlab.diffusion.latent_space import LatentScale
from ldmlab.errors import InputError
from ldmlab.first_stages.identity import Identity
from ldmlab.instantiate import instantiate, instantiate_with

GROUPS = ("backbone", "diffusion", "sampler", "conditioner", "first_stage")
BESIDE = ("lr_schedule", "optimizer", "loss", "task", "clip", "classifier", "encoder", "alignment", "callbacks")
BESIDE = (*BESIDE, "logger", "trainer")
SHARED = ("optimizer", "data", "trainer")  # every file knows the options that experiments set
EXPERIMENTS = group_choices("experiment")
DATA = ["data.train=nowhere/train", "data.val=nowhere/val"]
ONE_PART = (*GROUPS, "lr_schedule", "loss", "task", "clip", "classifier", "alignment")
PUBLISHED = ("image", "image_vit_l_14", "text", "text_transformer", "text_transformer_640")  # need weights or words
PUBLISHED = (*PUBLISHED, "text_vit_h_14", "text_vit_l_14", "text_emoji", "text_sd3")
PUBLISHED = (*PUBLISHED, "frozen_f16", "frozen_f8_small", "scores")  # need an encoder, a CLIP
TEACHER = {  # whose path and prediction a distilled model gets
    "schedule": {"_target_": "ldmlab.diffusion.schedule.Schedule"},
    "prediction": {"_target_": "ldmlab.diffusion.parameterization.EpsPrediction"},
}


def of_parts(name: str) -> Iterator[tuple[str, str]]:
    """(group, option) of all that an experiment's own file sets, also for the stages of stage=all."""
    node = yaml.safe_load((conf_dir() / "experiment" / f"{name}.yaml").read_text())
    known = set(groups())
    for option, _ in leaves({key: value for key, value in node.items() if key in known}):
        first, *rest = option.split(".")
        if first == "stage" and rest[0] != "evaluation" and rest[1:] and rest[1] in known:
            first, *rest = rest[1:]
        yield first, ".".join(rest)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_sets_no_option_of_a_choice(name: str) -> None:
    assert not {group for group, _ in of_parts(name)} - {*SHARED, "stage"}


@pytest.mark.parametrize(("group", "choice"), [(group, choice) for group in SHARED for choice in group_choices(group)])
def test_every_choice_knows_the_options_that_experiments_set(group: str, choice: str) -> None:
    wanted = {option for name in EXPERIMENTS for of, option in of_parts(name) if of == group}
    node = compose(f"{group}/{choice}", [])[group]
    assert wanted
    assert wanted <= node.keys()


def others(number: int) -> dict[str, str]:
    """Another choice of every group for each experiment, so that all choices meet some experiment."""
    choices = {g: [name for name in group_choices(g) if name not in PUBLISHED] for g in (*GROUPS, *BESIDE)}
    return {group: names[number % len(names)] for group, names in choices.items()}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A folder of conf with a part of each group that has none of the options of ours."""
    folder = tmp_path_factory.mktemp("conf")
    for group in ONE_PART:
        (folder / group).mkdir()
        (folder / group / "theirs.yaml").write_text("_target_: mylab.Part\n")
    return [f"hydra.searchpath=[file://{folder}]", *(f"{group}=theirs" for group in ONE_PART)]


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
    instantiate_with(config["lr_schedule"], where="lr_schedule", max_steps=8)
    instantiate_with(config["optimizer"], where="optimizer", global_batch=8)
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
    assert all(config[group] == {"_target_": "mylab.Part"} for group in ONE_PART)


def test_an_optimizer_from_outside_is_told_the_way_out() -> None:
    node = {"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.1, "learning_rate": 1e-3, "betas": [0.9, 0.99]}
    config = {"stage": {"name": "clip"}, "data": {}, "from_run": None, "conditioner": {}, "optimizer": node}
    with pytest.raises(InputError, match=r"leave it out: ~optimizer.learning_rate ~optimizer.betas"):
        check_choices(config, ["optimizer"])
    with pytest.raises(InputError, match=r"^optimizer.betas: torch.optim.SGD has no such option"):
        check_choices(config, ["optimizer", "optimizer.learning_rate"])
    check_choices(config, [])  # the optimizer is the file's own choice, which names the nearest option when it is built
