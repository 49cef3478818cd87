"""Files of configuration, ours and those of a user for the running command: where they lie, what typed options change.

An option that another one overrides, or that the stage does not read, is refused.
"""

import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ldmlab.argument_types import idle
from ldmlab.errors import InputError, did_you_mean

_PACKAGED = Path(__file__).parents[1] / "conf"
_CHECKOUT = Path(__file__).parents[3] / "conf"
OWN: list[str] = []  # a user's search path entries of the running command: file://FOLDER or pkg://PACKAGE


def conf_dir() -> Path:
    """The configuration that belongs to this code: inside an installed package, or at the root of a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def conf_dirs() -> list[Path]:
    """Ours, then the user's own of `--config-dir` and `hydra.searchpath`."""
    return [conf_dir(), *(folder for entry in OWN if (folder := folder_of(entry)) is not None)]


def find_file(path: str) -> Path | None:
    """The first folder's file of this name, without its ending: backbone/unet_small."""
    return next((file for folder in conf_dirs() if (file := folder / f"{path}.yaml").is_file()), None)


def group_choices(group: str) -> list[str]:
    """The names that `group=` accepts, with folders inside the group; `_NAME.yaml` are base files."""
    files = [(p, folder / group) for folder in conf_dirs() for p in (folder / group).rglob("*.yaml")]
    return sorted({str(p.relative_to(folder).with_suffix("")) for p, folder in files if p.name[0] != "_"})


def groups() -> list[str]:
    folders = [p for conf in conf_dirs() for p in conf.iterdir() if p.is_dir()]
    return sorted({p.name for p in folders if p.name != "hydra" and any(p.rglob("*.yaml"))})


def folder_of(entry: str) -> Path | None:
    """Where an entry of the search path lies; None for a package that cannot be found."""
    kind, _, place = entry.partition("://")
    if kind == "file":
        return Path(place)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping; an empty mapping counts as a value."""
    if isinstance(node, Mapping) and node:
        for key, child in node.items():
            yield from leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, node


Config = Mapping[str, Any]
NAMES = (
    *("stage", "data", "first_stage", "loss", "clip", "classifier", "backbone", "conditioner", "encoder", "diffusion"),
    *("alignment", "sampler", "task", "optimizer"),
    *("lr_schedule", "trainer", "callbacks", "logger", "paths", "seed", "run", "from_run", "teacher", "init_from"),
    "plugins",
)
_READ_BY: dict[str, tuple[str, ...]] = {  # group or option => the stages that read it
    "first_stage": ("autoencoder", "classifier", "diffusion"),
    "clip": ("clip",),
    "classifier": ("classifier",),
    **dict.fromkeys(("loss", "data.object_background"), ("autoencoder",)),
    **dict.fromkeys(("encoder", "alignment"), ("autoencoder", "diffusion")),
    **dict.fromkeys(("diffusion", "from_run", "data.latents"), ("classifier", "diffusion")),
    **dict.fromkeys(("backbone", "conditioner", "sampler", "task", "teacher", "data.states"), ("diffusion",)),
}
_OF_TRAINING = ("latents", "flip", "mix", "balance", "balance_temperature", "states", "object_background")  # of `data`
_OF_PANELS = ("stage.panel_", "stage.guidance_", "stage.guided_", "sampler")
_SLOTS = {  # what a conditioner may give a backbone => its width there, and the options that are for it
    "tokens": ("context_width", ("backbone.transformer_depth", "backbone.context")),
    "a vector": ("vector_width", ("backbone.project_vector", "backbone.vector_balance")),
}


def chosen_options(words: Collection[str] | None = None) -> frozenset[str]:
    """The options that were typed, as dotted names; what Hydra takes from its files by default is no choice."""
    from hydra.core.hydra_config import HydraConfig

    if words is None:
        words = HydraConfig.get().overrides.task if HydraConfig.initialized() else sys.argv[1:]
    return frozenset(word.partition("=")[0].lstrip("+~").partition("@")[0] for word in words)


def check_added(program: str, words: Collection[str]) -> None:
    """Refuse `+name=...` where nothing of conf/PROGRAM.yaml has that name, so that nothing would read it."""
    content = yaml.safe_load((conf_dir() / f"{program}.yaml").read_text())
    groups = [name for entry in content.pop("defaults") if isinstance(entry, Mapping) for name in entry]
    known = {*content, "hydra", *(name.rpartition("@")[2].partition(".")[0] for name in groups)}
    for name in (word.partition("=")[0].lstrip("+") for word in words if word.startswith("+")):
        if name.partition(".")[0].rpartition("@")[2] not in known:
            raise InputError(f"{name}: nothing reads this option; leave it out.")


def check_names(config: Config) -> None:
    """Refuse unused names, which are typos, also in an experiment file."""
    for name in config.keys() - NAMES:
        raise InputError(f"{name}: nothing reads this option; {did_you_mean(name, NAMES, 'leave it out.')}")


def check_choices(config: Config, chosen: Collection[str]) -> None:
    """InputError for the first option of `chosen` that would have no effect."""
    from ldmlab.data.transfers import is_address

    stage, options = config["stage"]["name"], dict(leaves(config))
    for group in sorted((config.keys() & set(chosen)) - {"trainer"}):  # it takes those of Lightning's, too
        _check_taken(group, config[group], chosen)
    check_effects({group: node for group, node in config.items() if stage in _READ_BY.get(group, (stage,))}, chosen)
    for name in sorted(chosen):
        group = name.split(".")[0].split("/")[-1]
        for read in (group, name):
            if stage not in _READ_BY.get(read, (stage,)) and config.get(group):
                raise InputError(f"{name}: stage={stage} reads no {read}; leave it out, or choose another stage.")
        unseen = name.startswith(_OF_PANELS) and name != "stage.panel_steps"  # which the schedule must have
        if unseen and not (config["callbacks"] or {}).get("panels"):
            raise InputError(f"{name} has no effect without callbacks.panels; set that too, or leave {name} out.")
        if name.startswith("data.shard_cache") and not any(
            is_address(str(options.get(f"data.{place}"))) for place in ("train", "val", "latents")
        ):
            raise InputError(f"{name} has no effect without shards at an address, such as s3://; leave it out.")
        if stage == "classifier" and group == "diffusion" and "." in name and not name.startswith("diffusion.schedule"):
            raise InputError(f"{name}: stage=classifier reads diffusion.schedule only; leave {name} out.")
    latents, run = config["data"].get("latents"), config["from_run"]
    if stage in ("classifier", "diffusion") and (latents or run):
        source = f"data.latents={latents}" if latents else f"from_run={run}"
        for name in sorted(chosen):
            if name.split(".")[0] == "first_stage":
                raise InputError(f"{name}: the first stage comes with {source}; leave one of the two out.")
    for name, node in (config["conditioner"] or {}).items():
        for option in sorted(chosen) if node and node.get("from_run") else ():
            head, _, key = option.removeprefix(f"conditioner.{name}.").partition(".")
            own = option.startswith(f"conditioner.{name}.") and head in ("config", "name", "pretrained")
            if own and (key or node.get(head) is not None):
                raise InputError(
                    f"{option}: the network comes with conditioner.{name}.from_run={node['from_run']}; leave one of "
                    "the two out."
                )


def _check_taken(group: str, part: Any, chosen: Collection[str]) -> None:
    """InputError for options, set by an experiment for the part that it names, which the chosen part lacks."""
    from ldmlab.instantiate import locate, takes

    if not isinstance(part, Mapping) or not isinstance(part.get("_target_"), str):
        return
    target = locate(part, where=group, trust=True)
    options = [f"{group}.{name}" for name in part if not name.startswith("_") and not takes(target, name)]
    if lacking := [name for name in options if name not in chosen]:
        raise InputError(
            f"{', '.join(lacking)}: {part['_target_']} has no such option; where an experiment sets it, leave it out: "
            f"{' '.join(f'~{name}' for name in lacking)}."
        )


def without_size(config: Any) -> Any:
    """A composed configuration whose `data` need no image_size: images are compared at the model's."""
    from omegaconf import OmegaConf

    if (data := config.get("data")) is not None and OmegaConf.is_missing(data, "image_size"):
        data["image_size"] = None
    return config


def check_compared(config: Config, chosen: Collection[str], size: int | Sequence[int], also: Collection[str]) -> None:
    """InputError for an option of `data` in `chosen` that a comparison with real images passes over.

    size: of the images, px; also: options for training that this one reads, too.
    """
    for name in (f"data.{name}" for name in _OF_TRAINING if name not in also):
        if name in chosen:
            raise InputError(f"{name}: only training reads it, and real images are compared as stored; leave it out.")
    size = max(size) if isinstance(size, Sequence) else size
    given = (config.get("data") or {}).get("image_size")
    if "data.image_size" in chosen and given != size:
        raise InputError(
            f"data.image_size={given}: images are compared at {size} px; leave it out, or choose another size by "
            "protocol.image_size of evaluate.py."
        )


def check_effects(config: Config, chosen: Collection[str], where: str = "") -> None:
    """InputError for an option of `chosen` that its part declares to be without effect; a line for one of a file."""
    for name, node in config.items():
        if isinstance(node, Mapping):
            check_effects(node, chosen, f"{where}.{name}" if where else name)
    if not isinstance(config.get("_target_"), str):
        return
    from ldmlab.distributed import say  # with torch
    from ldmlab.instantiate import locate

    for name, text, in_vain in idle(locate(config, where=where, trust=True), config, where):
        if name in chosen:
            raise InputError(text)
        if in_vain:
            say(text)


def check_heads(width: Any, first_stage: Any) -> None:
    """InputError where heads of this width leave channels of a level out, as in some published networks."""
    from ldmlab.first_stages.deep_compression_blocks import LinearAttention

    blocks = [module.to_q for module in first_stage.modules() if isinstance(module, LinearAttention)]
    if not blocks or any(block.in_channels != block.out_channels for block in blocks):
        raise InputError(
            f"first_stage.attention_head_dim={width} divides no level of EfficientViTBlock, or leaves channels out "
            "that no head would see; choose a divisor of every such level."
        )


def check_built(config: Config, plan: Any, chosen: Collection[str]) -> None:
    """Options without effect, which only the finished parts show."""
    size, latents = config["data"].get("image_size"), config["data"].get("latents")
    if "data.image_size" in chosen and latents and size != plan.spec["image_size"]:
        raise InputError(
            f"data.image_size={size}: data.latents={latents} were made from images of {plan.spec['image_size']} px; "
            "leave data.image_size out, or encode again."
        )
    guided = sorted(name for name in chosen if name.startswith(("stage.guidance_", "stage.guided_")))
    if guided and not plan.spec.get("guidance_trained", True):
        raise InputError(
            f"{guided[0]}: this model's conditions are never dropped in training, so it cannot be guided; "
            "leave it out, or set conditioner.NAME.drop=0.1."
        )
    if config["stage"].get("guidance_scale") == 1 and (more := [name for name in guided if name[-5:] != "scale"]):
        raise InputError(f"{more[0]} does nothing at stage.guidance_scale=1 (off); choose another scale.")
    backbone = plan.spec.get("backbone") or {}
    levels = [2**level for level, _ in enumerate(backbone.get("channel_mult") or ())]
    for name in sorted(chosen):
        if name.startswith("stage.codebook_") and plan.stage.codebook is None:
            raise InputError(f"{name}: this first stage has no codebook; leave it out, or choose a vq_*, fsq_*, ...")
        for slot in (slot for slot, (width, names) in _SLOTS.items() if name in names and not backbone.get(width)):
            raise InputError(f"{name} has no effect without a conditioner that gives {slot}; leave it out.")
        if name == "first_stage.attention_head_dim":
            check_heads(config["first_stage"]["attention_head_dim"], plan.stage.first_stage)
        if name == "backbone.attention_downsampling" and set(backbone["attention_downsampling"]) - set(levels):
            found = list(backbone["attention_downsampling"])
            raise InputError(f"{name}={found} names a level that is not there; choose among {levels}.")
