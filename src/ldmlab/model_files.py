"""Where a model's description and weights lie: a run folder, a checkpoint of one, or a model folder.

Both kinds of folder hold `model.yaml`. A model folder keeps weights as `NAME.safetensors`; a run folder keeps what it
trains in checkpoints, and what it only uses (a frozen first stage, a frozen text tower) as `NAME.safetensors`.
`model.yaml` lists the SHA-256 of these files, which are checked when they are read; folders of ldmlab 0.1 have none.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmlab import format1
from ldmlab.checkpoints import load_checkpoint, load_tensors, save_tensors, write_atomically
from ldmlab.errors import InputError

FORMAT_VERSION = 2
DESCRIPTION = "model.yaml"
StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk: what to build, and the weights by the name of the part."""

    folder: Path
    spec: dict[str, Any]  # model.yaml
    parts: dict[str, StateDict]  # first_stage | denoiser | conditioner | clip
    weights: str  # averaged | raw: what the trained part holds
    step: int | None  # optimizer updates; None for a model folder that does not say


def read_model(path: Path | str, weights: str = "averaged") -> ModelFiles:
    """Description and weights of the model at `path`; InputError naming what is missing or damaged."""
    folder, checkpoint = _locate(Path(path))
    spec = read_description(folder)
    check_hashes(folder, spec)
    parts = {file.stem: load_tensors(file) for file in sorted(folder.glob("*.safetensors"))}
    if checkpoint is None:
        _check_complete(folder, spec, parts)
        return ModelFiles(folder, spec, parts, spec.get("weights", "averaged"), spec.get("step"))
    content = load_checkpoint(checkpoint, lazily=True)  # half of it and more is the optimizer's
    modules = {name: dict(state) for name, state in content["modules"].items()}
    averages = content.get("averaged", {}) if weights == "averaged" else {}
    for name, average in averages.items():
        modules[name].update(_like(average["weights"], modules[name]))
    modules = {name: {key: tensor.clone() for key, tensor in state.items()} for name, state in modules.items()}
    return ModelFiles(folder, spec, parts | modules, "averaged" if averages else "raw", content["step"])


def read_description(folder: Path) -> dict[str, Any]:
    """model.yaml, checked for version; one of format 1 comes with today's names."""
    try:
        spec = yaml.safe_load((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {DESCRIPTION}, so it is no model; give a run or model folder.") from None
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{folder / DESCRIPTION} cannot be read ({str(error).splitlines()[0]}).") from None
    version = spec.get("format_version") if isinstance(spec, dict) else None
    if version == 1:
        return {**format1.node(spec), "format_version": FORMAT_VERSION}
    if version != FORMAT_VERSION:
        raise InputError(f"{folder / DESCRIPTION} has format_version={version}, this ldmlab reads {FORMAT_VERSION}.")
    return spec


def write_description(folder: Path, spec: Mapping[str, Any]) -> None:
    """model.yaml, whole or not at all, with the hashes of the weights that lie beside it."""
    if (folder / DESCRIPTION).is_file():
        check_hashes(folder, read_description(folder))  # else it would vouch for a file that was exchanged
    hashes = {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}
    content = {"format_version": FORMAT_VERSION, **spec, "sha256": hashes}
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_atomically(folder / DESCRIPTION, write)


def write_model_folder(folder: Path, spec: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A model folder; the description, which makes it one, comes last."""
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
        if sha256(file) != expected:
            load_tensors(file)  # a torn file, a pointer or a web page is named as such
            raise InputError(
                f"{file} has another SHA-256 than {DESCRIPTION} lists, so it was damaged or exchanged; "
                "copy or export it again."
            )


def sha256(file: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def newest_checkpoint(folder: Path) -> Path | None:
    """The latest step_*.ckpt of a run folder."""
    files = sorted((folder / "checkpoints").glob("step_*.ckpt"))
    return files[-1] if files else None


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The folder with model.yaml, and the checkpoint when it is a run's."""
    if path.is_file() and path.suffix == ".ckpt":
        return path.parents[1], path
    if not path.is_dir():
        raise InputError(f"{path} is neither a folder nor a checkpoint; give a run folder, model folder or .ckpt file.")
    if (path / "checkpoints").is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise InputError(f"{path} has no finished checkpoint yet; let its training reach one.")
        return path, checkpoint
    return path, None


def _check_complete(folder: Path, spec: Mapping[str, Any], parts: Mapping[str, StateDict]) -> None:
    for file in spec.get("files", []):
        if Path(file).stem not in parts:
            raise InputError(f"{folder / file} is missing although model.yaml lists it; copy or export it again.")


def _like(average: Mapping[str, Tensor], raw: Mapping[str, Tensor]) -> StateDict:
    """Averages in the dtype of the raw weights."""
    return {name: value.to(raw[name].dtype) for name, value in average.items()}
