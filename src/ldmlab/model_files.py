"""Description and weights of a model on disk: a run folder, a checkpoint of one, or a model folder.

Both kinds of folder hold `model.yaml`. A model folder keeps weights as `NAME.safetensors`; a run folder keeps what it
trains in checkpoints, and what it only uses (a frozen first stage, a frozen text tower) as `NAME.safetensors`.
`model.yaml` lists the SHA-256 of these files, which are checked when they are read; folders of ldmlab 0.1 have none.
By its own hash, `fingerprint`, a value that was changed since is noticed: a warning says so, and the model is read.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmlab import format1, plugins
from ldmlab.averaging import checked_length, reconstruct
from ldmlab.checkpoints import load_checkpoint, load_tensors, save_tensors
from ldmlab.errors import InputError, first_line, shown
from ldmlab.files import by_step, file_sha256, write_text
from ldmlab.sharded import STATE, laid_out

FORMAT_VERSION = 2
DESCRIPTION = "model.yaml"
CONFIG = "config.yaml"
DATA = "data.json"  # of a run: origin, licences and data sheet of what it read
_KINDS = {  # kind => what its description must hold besides image_size
    "first_stage": ("first_stage",),
    "clip": ("clip",),
    "classifier": ("classifier", "latent_scale", "schedule"),
    "latent_diffusion": ("first_stage", "latent_scale", "backbone", "conditioners", "diffusion", "sampler"),
}
MODELS = Path(__file__).parents[2] / "models"  # of a checkout: models that come along
_LARGEST_BYTES = 4 * 2**20  # of a yaml file that describes a run or a model
_LARGEST_NODES = 200_000  # values in it, counted as often as aliases repeat them
_DEEPEST = 60
_AGAIN = "export or copy the model again"
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk or read from elsewhere: what to build, and the weights by the name of the part."""

    folder: Path  # or the file, or what else it was read from
    spec: dict[str, Any]  # model.yaml
    parts: dict[str, StateDict]  # first_stage | denoiser | conditioner | clip
    weights: str  # averaged | raw | average of length L: what the trained part holds
    step: int | None = None  # optimizer updates, where known
    notes: tuple[str, ...] = ()  # for the user, from an import


def read_model(path: Path | str, weights: str | float = "averaged") -> ModelFiles:
    """Description and weights of the model at `path`; InputError naming what is missing or damaged.

    weights: averaged | raw | the length of an average, made from the snapshots of a run (`averaging.py`).
    """
    length = _length(weights)
    folder, checkpoint = _locate(Path(path))
    spec = read_description(folder)
    check_hashes(folder, spec)
    parts = {file.stem: load_tensors(file) for file in sorted(folder.glob("*.safetensors"))}
    if checkpoint is None:
        if (folder / CONFIG).is_file() and "files" not in spec:  # of a run, which lists none
            raise InputError(
                f"{folder} is a run without its folder checkpoints; let its training reach the first one, copy the "
                "folder too, or export the run."
            )
        files, step = spec.get("files") or [], spec.get("step")
        if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
            raise InputError(f"{folder / DESCRIPTION} has files={shown(files)}, no list of names; {_AGAIN}.")
        for file in files:
            if Path(file).stem not in parts:
                raise InputError(f"{folder / file} is missing although model.yaml lists it; {_AGAIN}.")
        if length is not None:
            raise InputError(f"weights={length}: {folder} is a model folder with weights of its own; give the run.")
        step = step if isinstance(step, int) and not isinstance(step, bool) else None
        return ModelFiles(folder, spec, parts, str(spec.get("weights", "averaged")), step)
    return _of_checkpoint(ModelFiles(folder, spec, parts, str(weights)), checkpoint, length)


def _of_checkpoint(files: ModelFiles, checkpoint: Path, length: float | None) -> ModelFiles:
    """The files with the raw weights of a checkpoint of the run, its averages, or an average of `length`."""
    parts = files.parts
    content = load_checkpoint(checkpoint, lazily=True)  # half of it and more is the optimizer's
    try:
        modules = {name: dict(state) for name, state in content["modules"].items()}
        averages = content.get("averaged", {}) if files.weights == "averaged" else {}
        for name, average in averages.items():
            if unknown := average["weights"].keys() - modules[name].keys():
                raise KeyError(min(unknown))
            modules[name].update(average["weights"])
        for name, state in modules.items():
            parts[name] = {key: _own(tensor) for key, tensor in state.items()}
        if length is not None:
            made = reconstruct(files.folder, length, content["step"])
            for name, tensors in made.parts.items():
                parts[name].update(tensors)
            return replace(files, weights=f"average of length {length:g}", step=made.step)
        return replace(files, weights="averaged" if averages else "raw", step=content["step"])
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{checkpoint} is not a checkpoint of ours ({type(error).__name__}: {error}); use another one."
        ) from error


def _own(tensor: Any) -> Tensor:
    """In memory of its own, float32 whatever the precision of training."""
    tensor = laid_out(tensor, None)
    return (tensor.float() if tensor.is_floating_point() else tensor).clone()


def _length(weights: str | float) -> float | None:
    """The length of an average that an option `weights` names."""
    if weights in ("averaged", "raw"):
        return None
    try:
        length = float(weights)
    except ValueError:
        raise InputError(
            f"weights={shown(weights)} is unknown; choose averaged, raw, or the length of an average such as 0.10."
        ) from None
    return checked_length(length, "weights")


def read_description(folder: Path) -> dict[str, Any]:
    """model.yaml in today's words, checked for version and for the parts of its kind."""
    path = folder / DESCRIPTION
    if not path.exists():
        raise InputError(f"{folder} has no {DESCRIPTION}, so it is no model; give a run or model folder.")
    spec = read_yaml(path)
    version = spec.get("format_version")
    if version not in (1, FORMAT_VERSION) or isinstance(version, bool):
        raise InputError(
            f"{path} has format_version={shown(version)}, this ldmlab reads 1 and {FORMAT_VERSION}; use the version of "
            "ldmlab that wrote it."
        )
    if version == 1:
        spec = {**format1.node(spec), "format_version": FORMAT_VERSION}
    _check_kind(path, spec)
    written, found = spec.pop("fingerprint", None), _fingerprint(spec)
    if written not in (None, found):
        warnings.warn(  # from this line, so that it is printed once
            f"{path} is not as it was written: values in it, or their order, were changed or damaged, and its model "
            f"may give other results; where you changed it, set fingerprint: '{found}' there.",
            stacklevel=1,
        )
    return spec


def _fingerprint(spec: Mapping[str, Any]) -> str:
    """A hash of the values of model.yaml; not of those whose name is a date or the like, which no part reads."""
    return hashlib.sha256(json.dumps(spec, default=str, skipkeys=True).encode()).hexdigest()[:16]


def describe(path: Path | str) -> dict[str, Any]:
    """model.yaml of a run folder, checkpoint or model folder, without its weights."""
    return read_description(model_folder(path))


def model_folder(path: Path | str) -> Path:
    """The folder with model.yaml of a run folder, checkpoint or model folder."""
    return _locate(Path(path))[0]


def read_config(folder: Path) -> dict[str, Any]:
    """A run's config.yaml in today's words; model.yaml in the same folder has the format version."""
    config = read_yaml(folder / CONFIG)
    description = folder / DESCRIPTION
    new = description.exists() and read_yaml(description).get("format_version") == FORMAT_VERSION
    return config if new else format1.config(config)


def _check_kind(path: Path, spec: Mapping[str, Any]) -> None:
    kind, size = spec.get("kind"), spec.get("image_size")
    needed = _KINDS.get(kind) if isinstance(kind, str) else None
    if needed is None:
        raise InputError(f"{path} has kind={shown(kind)}; there are {', '.join(_KINDS)}. {_AGAIN.capitalize()}.")
    for side in size if isinstance(size, list) and len(size) == 2 else [size]:
        if not isinstance(side, int) or isinstance(side, bool) or not 0 < side <= 2**16:
            raise InputError(f"{path} has image_size={shown(size)}, which is no size in px; {_AGAIN}.")
    for name in needed:
        if not isinstance(spec.get(name), dict):
            raise InputError(f"{path} has {name}={shown(spec.get(name))}, no description; {_AGAIN}.")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe yaml without merge keys, whose repetition grows without limit."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """`<<` is refused."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not supported", node.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from an untrusted file; InputError for anything else, before much memory is used."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing or no file; copy or make it again.")
        if path.stat().st_size > _LARGEST_BYTES:
            raise InputError(f"{path} is larger than {_LARGEST_BYTES // 2**20} MiB, so it describes no run or model.")
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read ({shown(first_line(error))}); copy or make it again.") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path} holds no options by name; copy or make it again.")
    if _count(content, {}, 0) > _LARGEST_NODES:
        raise InputError(f"{path} repeats its values more than {_LARGEST_NODES:,} times; it describes no run or model.")
    return content


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """Values inside, aliases counted each time they occur; a value that contains itself counts as too many."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) in known:
        return known[id(value)]
    if depth > _DEEPEST:
        return _LARGEST_NODES + 1
    known[id(value)] = _LARGEST_NODES + 1  # while its inside is counted
    inside = value.values() if isinstance(value, dict) else value
    known[id(value)] = 1 + sum(_count(part, known, depth + 1) for part in inside)
    return known[id(value)]


def write_description(folder: Path, spec: Mapping[str, Any]) -> None:
    """model.yaml, written atomically, with the hashes of the weights in its folder."""
    if (folder / DESCRIPTION).is_file():
        check_hashes(folder, read_yaml(folder / DESCRIPTION))  # else it would vouch for a file that was exchanged
    content = {**spec, "format_version": FORMAT_VERSION}
    if packages := plugins.versions(plugins.named_in(spec)):
        content["plugins"] = packages
    content["sha256"] = {file.name: file_sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    content["fingerprint"] = _fingerprint(yaml.safe_load(yaml.safe_dump(content, sort_keys=False)))
    write_text(folder / DESCRIPTION, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def write_model_folder(folder: Path, spec: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A model folder; the description is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in parts.items():
        save_tensors(folder / f"{name}.safetensors", tensors)
    write_description(folder, {**spec, "files": sorted(f"{name}.safetensors" for name in parts)})


def check_hashes(folder: Path, spec: Mapping[str, Any]) -> None:
    """Weights must be the files that model.yaml was written for; nothing to check where it lists no hashes."""
    hashes = spec.get("sha256", {})
    if not isinstance(hashes, dict):
        raise InputError(f"{folder / DESCRIPTION}: sha256 must list file names and hashes; export or copy it again.")
    for name, expected in hashes.items():
        file = folder / Path(str(name)).name
        if not file.is_file():
            raise InputError(f"{file} is missing although {DESCRIPTION} lists it; copy or export it again.")
        if file_sha256(file) != expected:
            load_tensors(file)  # a torn file, a pointer or a web page is named as such
            raise InputError(
                f"{file} has another SHA-256 than {DESCRIPTION} lists, so it was damaged or exchanged; "
                "copy or export it again."
            )


def named(path: Path) -> Path:
    """A path as it is; the name of a model that comes along, such as emoji or emoji/clip, as its folder."""
    return MODELS / path if not path.exists() and (MODELS / path / DESCRIPTION).is_file() else path


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The folder with model.yaml, and the checkpoint when it is a run's."""
    path = named(path)
    if path.suffix == ".ckpt" and (path.is_file() or (path / STATE).is_file()):
        return path.parents[1], path
    if not path.is_dir():
        raise InputError(
            f"{path} is neither a folder nor a checkpoint; give a run folder, model folder or .ckpt file, or a "
            "name that `ldmlab models` lists."
        )
    if (path / "checkpoints").is_dir():
        checkpoints = by_step(path / "checkpoints", ".ckpt")
        if not checkpoints:
            raise InputError(f"{path} has no finished checkpoint yet; let its training reach one.")
        return path, checkpoints[-1]
    return path, None
