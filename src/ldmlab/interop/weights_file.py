"""Weights that others wrote, read lazily: .safetensors, or torch files of which nothing but data is unpickled."""

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldmlab.checkpoints import load_tensors
from ldmlab.errors import InputError

ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Old trainers left notes of these packages beside the weights; they are read as `Note`, which does nothing.
_NOTES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "typing.")


class Note:
    """Stands for an object that is no tensor and of no use here: whatever it is given is dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_weights(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors by name, left on disk until used, and the step of the trainer if the file tells it."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give a {', '.join(ENDINGS)} file or a diffusers folder.")
    if path.suffix == ".safetensors":
        return _without_copy(path), None
    content = _unpickled(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__} instead of tensors by name; give another file.")
    state = content.get("state_dict", content)
    step = content.get("global_step")
    tensors = {str(key): value for key, value in state.items() if isinstance(value, Tensor)}
    strange = sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor))
    if "state_dict" in content and strange:
        raise InputError(f"{path}: state_dict.{strange[0]} is no tensor; give a file of weights.")
    if not tensors:
        raise InputError(f"{path} holds no tensors by name; give a file of weights.")
    return tensors, step if isinstance(step, int) else None


def _without_copy(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file whose memory is the file's."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, ValueError):
        return load_tensors(path)  # says what is wrong with it


def _unpickled(path: Path) -> Any:
    """The content of a torch file, by torch's reader of plain data."""
    if not zipfile.is_zipfile(path):
        return _tried(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("data.pkl") for name in archive.namelist()):
            raise InputError(f"{path} is an archive of other files; unpack it and give the checkpoint inside.")
    try:
        return _lazily(path)
    except pickle.UnpicklingError:  # more than data: notes, or a danger
        stand_ins = _notes_in(path)
    except Exception as error:
        raise _unreadable(path, error) from error
    with safe_globals(stand_ins):  # type: ignore[arg-type]
        return _tried(path, lambda: _lazily(path))


def _lazily(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _notes_in(path: Path) -> list[tuple[type, str]]:
    """What else the file asks for, all of it mere notes; InputError naming what is not."""
    needs = _tried(path, lambda: get_unsafe_globals_in_checkpoint(path))
    refused = sorted(name for name in needs if not name.startswith(_NOTES))
    if refused:
        raise InputError(
            f"{path} holds more than data and was not opened: it asks for {', '.join(refused[:5])}, which could "
            "run any code; convert it to .safetensors where you trust it."
        )
    return [(Note, name) for name in needs]


def _tried(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    """Why, in a line."""
    asked = re.search(r"GLOBAL (\S+)", str(error))  # what a file of torch's old format asks for
    first_line = (str(error).strip().splitlines() or [""])[0][:200]
    reason = f"it asks for {asked[1]}, which could run any code" if asked else f"{type(error).__name__} {first_line}"
    return InputError(
        f"{path} cannot be read as plain tensors ({reason}); give a whole file, or convert it to .safetensors "
        "where you trust it."
    )
