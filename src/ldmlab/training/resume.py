"""Comparison of a resumed run with its checkpoint before anything is written: which options may change."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ldmlab import distributed
from ldmlab.errors import InputError, shown
from ldmlab.instantiate import completed
from ldmlab.model_files import DESCRIPTION, read_config, read_description

Flat = dict[str, Any]  # dotted option => value
Fate = Literal["applied", "harmless", "refused"]

_APPLIED = (  # read at every start; changes are reported
    *("optimizer.learning_rate", "optimizer.lr_scaling", "optimizer.betas", "optimizer.epsilon"),
    *("optimizer.weight_decay", "optimizer.matrix_learning_rate", "optimizer.momentum", "lr_schedule", "sampler"),
    *("trainer", "callbacks", "logger", "data.val"),
    *("data.object_background", "stage.panel_steps", "stage.panel_count", "stage.guidance_scale"),
    *("stage.guidance_interval", "stage.guidance_rescale", "stage.guided_channels"),
    *("alignment.weight", "alignment.until_step"),
    *("stage.val_draws", "stage.noise_bins", "stage.codebook_alert"),
)
_HARMLESS = (  # of the place and the machine, or held against the checkpoint by content
    *("run", "paths", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy"),
    *("trainer.timeout_minutes", "trainer.compile", "trainer.plugins", "data.workers", "data.cache", "data.sha256"),
    *("data.cache_limit_gib", "data.shard_cache", "data.shard_cache_gib", "data.max_bad", "data.states", "plugins"),
    "stage.codebook_window",
    *("trainer.micro_batch", "trainer.accumulate", "trainer.accumulate_grad_batches"),  # their product with processes
    "trainer.global_batch",
    *("data.train", "data.latents", "from_run", "teacher", "seed"),  # the manifest and the weights; the seed by `fit`
)
_IMAGES = "trainer.micro_batch * accumulate * processes"  # of a step
_KEPT = (
    *("trainer._target_", "trainer.averaging_decay", "trainer.averaging_warmup", "trainer.averaging_start"),
    *("trainer.limit_train_batches", "trainer.overfit_batches", _IMAGES),
)
FATES: dict[str, Fate] = {  # the longest prefix of an option decides; an option that is not listed is refused
    **dict.fromkeys(_APPLIED, "applied"),
    **dict.fromkeys(_HARMLESS, "harmless"),
    **dict.fromkeys(_KEPT, "refused"),
}
_NETWORKS = ("first_stage", "clip", "classifier", "backbone", "conditioner", "diffusion", "task")  # by model.yaml
_SPEC_NAMES = {  # entries of model.yaml => the option that decides them
    "conditioners": "conditioner",
    "schedule": "diffusion.schedule",
    "image_size": "data.image_size",
    "latent_scale": "stage.latent_scale",
    "first_stage_fingerprint": "first_stage",
    "teacher_fingerprint": "weights of the teacher",
}
_SPEC_KEPT = (
    *("kind", "image_size", "first_stage", "clip", "classifier", "backbone", "conditioners", "diffusion"),
    *("task", "first_stage_fingerprint", "teacher_fingerprint", "schedule"),
)


@dataclass(frozen=True)
class Record:
    """Description of the run in a checkpoint, without the state: plain types only."""

    config: Mapping[str, Any] = field(default_factory=dict)  # the resolved configuration
    spec: Mapping[str, Any] = field(default_factory=dict)  # model.yaml
    frozen: Mapping[str, str] = field(default_factory=dict)  # fingerprints of the parts that checkpoints leave out


def compare(content: Mapping[str, Any], now: Record, images: int, folder: Path) -> list[str]:
    """The changed options that apply from here on, as text; InputError for those that a run keeps.

    images: of one step over all processes.
    """
    before = _recorded(content, folder)
    changes = _changes(before, now)
    step, position = content["step"], content["position"]
    if step and position % step == 0 and position // step != images:
        changes[_IMAGES] = (position // step, images)
    fates = {name: fate(name) for name in changes}
    if refused := [_shown(name, changes[name]) for name in sorted(changes) if fates[name] == "refused"]:
        more = f" and {len(refused) - 4} more" if len(refused) > 4 else ""
        raise InputError(
            f"the run in {folder} was trained with other options: {'; '.join(refused[:4])}{more}; give the values of "
            "before to continue, or start a new run, with init_from for its weights."
        )
    return [_shown(name, changes[name]) for name in sorted(changes) if fates[name] == "applied"]


def fate(name: str) -> Fate:
    """The treatment of a changed option: that of its longest listed prefix."""
    while name not in FATES and "." in name:
        name = name.rpartition(".")[0]
    return FATES.get(name, "refused")


def _shown(name: str, values: tuple[Any, Any]) -> str:
    texts = [shown(value) if value is None or isinstance(value, bool) else str(value) for value in values]
    before, now = (text if len(text) < 80 else f"{text[:77]}..." for text in texts)
    return f"{name}={before} before, {now} now"


def _recorded(content: Mapping[str, Any], folder: Path) -> Record:
    """The run's description in the checkpoint; for a checkpoint of format 1 it comes from the files of the folder."""
    run = content.get("run")
    if isinstance(run, Mapping):
        return Record(run["config"], run["spec"], run["frozen"])
    config: Any = {}
    spec: Mapping[str, Any] = {}
    try:
        config = read_config(folder)
        spec = read_description(folder)
    except InputError:
        missing = "config.yaml" if not config else DESCRIPTION
        distributed.say(
            f"{folder / missing} is missing or damaged, so the options are not compared with the previous ones."
        )
    return Record(config, spec, {})


def _changes(before: Record, now: Record) -> dict[str, tuple[Any, Any]]:
    """Options whose values changed; options that only one side has are ignored."""
    used = [name for name in now.config if name not in _NETWORKS]
    if now.spec.get("kind") != "first_stage":
        used = [name for name in used if name != "loss"]
    pairs = [(name, before.config.get(name), now.config[name]) for name in used if name in before.config]
    pairs += [
        (_SPEC_NAMES.get(n, n), before.spec[n], now.spec[n]) for n in _SPEC_KEPT if n in before.spec.keys() & now.spec
    ]
    if ("task" in before.spec) != ("task" in now.spec) and before.spec:
        pairs.append(("task", before.spec.get("task"), now.spec.get("task")))
    pairs += [(part, before.frozen[part], mark) for part, mark in now.frozen.items() if part in before.frozen]
    found: dict[str, tuple[Any, Any]] = {}
    for name, old, new in pairs:
        left, right = _flat(old, name), _flat(new, name)
        found |= {key: (left.get(key), right.get(key)) for key in left | right if _differ(key, left, right)}
    if not any(name.startswith("stage.latent_scale") for name in found) and _scales_differ(before.spec, now.spec):
        found["stage.latent_scale"] = (before.spec["latent_scale"], now.spec["latent_scale"])
    return found


def _scales_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Measured again, a scale may differ in its last digits, by the order of the sums."""
    if "latent_scale" not in before or "latent_scale" not in now:
        return False
    left, right = (_flat(spec["latent_scale"], "") for spec in (before, now))
    return left.keys() != right.keys() or any(not _close(left[key], right[key]) for key in left)


def _close(left: Any, right: Any) -> bool:
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(_close(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float | int) and isinstance(right, float | int):
        return math.isclose(left, right, rel_tol=1e-3, abs_tol=1e-6)
    return bool(left == right)


def _flat(value: Any, name: str) -> Flat:
    """Dotted options of a node with its defaults filled in, where its target is known."""
    with suppress(InputError):  # of a part from outside, whose node is compared as it was configured
        value = completed(value, where=name)
    if not isinstance(value, Mapping):
        return {name: _plain(value)}
    if not value:
        return {name: {}}
    flat: Flat = {}
    for key, part in value.items():
        flat |= _flat(part, f"{name}.{key}")
    return flat


def _plain(value: Any) -> Any:
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _differ(key: str, left: Flat, right: Flat) -> bool:
    if key in left and key in right:
        return bool(left[key] != right[key])
    return fate(key) == "refused" and key.partition(".")[0] not in ("stage", "trainer", "data", "run")
