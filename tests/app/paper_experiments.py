"""The experiments of the paper as the tests see them: what their headers say, and what they compose to."""

import re
from copy import deepcopy
from functools import cache
from typing import Any

from ldmlab.app.compose import compose, conf_dir, group_choices, plain

PAPER = [name for name in group_choices("experiment") if name.startswith("paper/")]
_ENTRIES = ("Settings", "First stage", "Cost", "Plan", "Rows", "Zoo", "Score", "assumed")


@cache
def header(name: str) -> dict[str, list[str]]:
    """Entries of the header, continued lines joined; "title" comes before the first, "commands" are set off."""
    text = (conf_dir() / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    found: dict[str, list[str]] = {entry: [] for entry in ("title", "commands", *_ENTRIES)}
    last = found["title"]
    for line in text.splitlines()[1:]:
        label, _, rest = line.removeprefix("# ").partition(": ")
        if label in _ENTRIES:
            last = found[label]
            last.append(rest)
        elif line.startswith(("#   python", "#   ldmlab")):
            found["commands"].append(line.removeprefix("#   "))
        elif line.startswith("#   ") and last:
            last[-1] += " " + line.removeprefix("#   ")
        else:
            last.append(line.removeprefix("# "))
    return found


def rows(name: str) -> list[str]:
    """The rows of the paper's tables that the experiment stands for, as table/row."""
    return [row for entry in header(name)["Rows"] for row in entry.split(", ")]


def first_stage_experiment(name: str) -> str | None:
    """The experiment that trains the first stage; None for pixels."""
    told = header(name)["First stage"][0]
    return None if told == "none, pixels" else told


@cache
def _composed(name: str) -> dict[str, Any]:
    return plain(compose("train", [f"experiment={name}"]))


def composed(name: str) -> dict[str, Any]:
    """The experiment's configuration, to be changed at will."""
    return deepcopy(_composed(name))


def of_stage(stage: str) -> list[str]:
    """The paper's experiments of a stage."""
    folders = {"autoencoder": ("paper/first_stage/",), "classifier": ("paper/class/imagenet_ldm_8_g",)}
    others = tuple(prefix for prefixes in folders.values() for prefix in prefixes)
    if stage in folders:
        return [name for name in PAPER if name.startswith(folders[stage])]
    return [name for name in PAPER if not name.startswith(others)]


def released() -> dict[str, str]:
    """Official layout => an experiment that names its file."""
    found: dict[str, str] = {}
    for name in PAPER:
        for zoo in header(name)["Zoo"]:
            if match := re.search(r"models/ldm/([\w-]+)", zoo):
                found[f"ldm__{match[1]}"] = name
            elif match := re.search(r"configs/latent-diffusion/([\w-]+)\.yaml", zoo):
                found[match[1]] = name
            elif name.startswith("paper/first_stage/"):
                found[f"first_stage_{zoo.removesuffix('.zip')}"] = name
    return found


def settings(config: dict[str, Any]) -> str:
    """What a header must say of its experiment, from the composed configuration."""
    trainer, schedule = config["trainer"], config["lr_schedule"]
    batch, rate = trainer["global_batch"], config["optimizer"]["learning_rate"]
    shape = schedule["_target_"].rpartition(".")[2].lower()
    told = [f"batch {batch}", f"rate {rate:g} {shape}", f"{trainer['max_steps']:,} steps"]
    if schedule["warmup_steps"]:
        told[1] += f" after {schedule['warmup_steps']:,} steps of rise"
    if config["stage"]["name"] == "autoencoder":
        adversary = config["loss"]["adversary"]
        plays = (
            f"adversary {adversary['weight']} from step {adversary['adversary_start']:,}"
            if adversary
            else "no adversary"
        )
        trained = config["stage"].get("trained")
        return ", ".join([*told, plays, *([f"trained {' and '.join(trained)}"] if trained else [])])
    path = config["diffusion"]["schedule"]
    told += [f"betas {path['start']:g} to {path['end']:g}" if "start" in path else path["_target_"].rpartition(".")[2]]
    if config["stage"]["name"] == "classifier":
        return ", ".join(told)
    loss = config["diffusion"]["loss"]
    told += [loss if isinstance(loss, str) else loss["_target_"].rpartition(".")[2]]
    told += [f"latent scale {config['stage']['latent_scale']}"]
    sampler, stage = config["sampler"], config["stage"]
    name = sampler["_target_"].rpartition(".")[2].upper()
    told[-1] += f"; {name} {stage['panel_steps']} steps"
    told += [f"eta {sampler['eta']:g}"] if "eta" in sampler else []
    return ", ".join([*told, f"guidance {stage['guidance_scale']:g}"])
