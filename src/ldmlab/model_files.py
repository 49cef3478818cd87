"""Where a model's description and weights lie: a run folder, a checkpoint of one, or a model folder.

Both kinds of folder hold `model.yaml`. A model folder keeps weights as `NAME.safetensors`; a run folder keeps what it
trains in checkpoints, and what it only uses (a frozen first stage, a frozen text tower) as `NAME.safetensors`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from ldmlab.checkpoints import load_checkpoint, load_tensors, save_tensors, write_atomically
from ldmlab.errors import InputError

FORMAT_VERSION = 1
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
    """model.yaml, checked for version."""
    try:
        spec = yaml.safe_load((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {DESCRIPTION}, so it is no model; give a run or model folder.") from None
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{folder / DESCRIPTION} cannot be read ({str(error).splitlines()[0]}).") from None
    version = spec.get("format_version") if isinstance(spec, dict) else None
    if version != FORMAT_VERSION:
        raise InputError(f"{folder / DESCRIPTION} has format_version={version}, this ldmlab reads {FORMAT_VERSION}.")
    return spec


def write_description(folder: Path, spec: Mapping[str, Any]) -> None:
    """model.yaml, whole or not at all."""
    text = yaml.safe_dump({"format_version": FORMAT_VERSION, **spec}, sort_keys=False, allow_unicode=True)

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    write_atomically(folder / DESCRIPTION, write)


def write_model_folder(folder: Path, spec: Mapping[str, Any], parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    """A model folder; the description, which makes it one, comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in parts.items():
        save_tensors(folder / f"{name}.safetensors", tensors)
    write_description(folder, {**spec, "files": sorted(f"{name}.safetensors" for name in parts)})


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
