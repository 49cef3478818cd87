"""A model read from elsewhere: its tensors, how they differ from a network's, and the network filled with them.

Files are read lazily: .safetensors, or torch files of which nothing but data is unpickled.
"""

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldmlab.build import build_latent_diffusion, pick_device
from ldmlab.checkpoints import fill, fingerprint, load_tensors, unreadable, without_weights
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion
    from ldmlab.inference.model import LoadedModel


@dataclass(frozen=True)
class Imported:
    """What was read of a model in a foreign format: model.yaml, and tensors under our names."""

    source: str
    spec: dict[str, Any]
    parts: dict[str, dict[str, Tensor]]  # first_stage | denoiser | conditioner, in the dtype of the source
    weights: str  # averaged | raw
    step: int | None = None
    notes: tuple[str, ...] = ()  # for the user


def assembled(imported: Imported) -> "LatentDiffusion":
    """The latent diffusion model, frozen, in float32."""
    with without_weights():
        model = build_latent_diffusion(imported.spec)
    modules = {"first_stage": model.first_stage, "denoiser": model.backbone, "conditioner": model.conditioners}
    tensors = {name: imported.parts.get(name, {}) for name in modules}
    refuse_mismatch({name: compare(tensors[name], module.state_dict()) for name, module in modules.items()})
    for name, module in modules.items():
        fill(module, tensors[name])
    return model.eval().requires_grad_(False)


def assembled_first_stage(imported: Imported) -> nn.Module:
    """The first stage of a model, or alone, in float32."""
    with without_weights():
        module: nn.Module = instantiate(imported.spec["first_stage"], where="first_stage")
    tensors = imported.parts["first_stage"]
    refuse_mismatch({"first stage": compare(tensors, module.state_dict())})
    fill(module, tensors)
    return module.eval().requires_grad_(False)


def loaded_model(imported: Imported, device: str = "auto") -> "LoadedModel":
    """Ready to sample, as `ldmlab.load` gives it."""
    from ldmlab.inference.model import LoadedModel

    if imported.spec["kind"] != "latent_diffusion":
        raise InputError(f"{imported.source} is a {imported.spec['kind']}, which samples nothing; use `ldmlab import`.")
    model = assembled(imported)
    info = {
        "path": imported.source,
        "weights": imported.weights,
        "step": imported.step,
        "fingerprint": fingerprint(model.backbone.state_dict()),
        "spec": imported.spec,
    }
    return LoadedModel(model.to(pick_device(device)), image_size=imported.spec["image_size"], info=info)


_LISTED = 30  # names of one sort in a message


class Mismatch(NamedTuple):
    """How tensors of a file differ from those of a network."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        sorts = (
            f"{len(names)} {sort} ({', '.join(names[:_LISTED])}{', ...' if len(names) > _LISTED else ''})"
            for sort, names in self._asdict().items()
            if names
        )
        return ", ".join(sorts)


def compare(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], either_rank: Iterable[str] = ()) -> Mismatch:
    """Names and shapes against those expected; for `either_rank` 1 x 1 convolutions and linear layers are the same."""
    loose = set(either_rank)

    def same(name: str) -> bool:
        shape, full = tuple(tensors[name].shape), tuple(expected[name].shape)
        short, long = sorted((shape, full), key=len)
        return shape == full or (name in loose and long[: len(short)] == short and prod(long[len(short) :]) == 1)

    shared = expected.keys() & tensors.keys()
    wrong = sorted(name for name in shared if not same(name))
    return Mismatch(
        missing=sorted(expected.keys() - tensors.keys()),
        unexpected=sorted(tensors.keys() - expected.keys()),
        misshapen=[f"{name} {list(tensors[name].shape)} instead of {list(expected[name].shape)}" for name in wrong],
    )


def refuse_mismatch(mismatches: Mapping[str, Mismatch]) -> None:
    """One InputError for all parts that do not fit."""
    wrong = [f"the {part} has {mismatch} keys" for part, mismatch in mismatches.items() if mismatch]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; give the configuration that belongs to these weights.")


ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Old trainers stored objects of these packages with the weights; they are read as `Note`, which does nothing.
_NOTES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "typing.")


class Note:
    """Placeholder of an unused object that is no tensor; its content is dropped."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_weights(path: Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors by name, left on disk until used, and the step of the trainer if the file has it."""
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
        return load_tensors(path)  # explains what is wrong with it


def _unpickled(path: Path) -> Any:
    """The content of a torch file, by torch's restricted unpickler."""
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
    """The classes that the file refers to; InputError for those that are not ignored."""
    needs = _tried(path, lambda: get_unsafe_globals_in_checkpoint(path))
    refused = sorted(name for name in needs if not name.startswith(_NOTES))
    if refused:
        raise InputError(
            f"{path} holds more than data and was not opened: it refers to {', '.join(refused[:5])}, which could "
            "run any code; convert it to .safetensors where you trust it."
        )
    return [(Note, name) for name in needs]


def _tried(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as plain tensors ({unreadable(path, error)}); use another file.")
