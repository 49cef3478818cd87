"""A model read from elsewhere: its tensors, and the networks filled with them.

Files are read lazily: .safetensors, or torch files of which nothing but data is unpickled.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldmlab.build import build_latent_diffusion, fill_latent_diffusion
from ldmlab.checkpoints import load_exactly, load_tensors, unreadable, without_weights
from ldmlab.disks import open_regular
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import ModelFiles

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from typing import Self

from torch._utils import _rebuild_tensor_v2

from ldmlab.interop.renaming import StateDict


def assembled(files: ModelFiles) -> "LatentDiffusion":
    """The latent diffusion model, frozen, in float32."""
    with without_weights():
        model = build_latent_diffusion(files.spec)
    fill_latent_diffusion(model, files)
    return model.eval().requires_grad_(False)


def assembled_first_stage(files: ModelFiles) -> nn.Module:
    """The first stage of a model, or alone, in float32."""
    with without_weights():
        module: nn.Module = instantiate(files.spec["first_stage"], where="first_stage")
    load_exactly(module, files.parts["first_stage"], f"{files.folder} (first_stage)")
    return module.eval().requires_grad_(False)


ENDINGS = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Old trainers stored objects of these packages with the weights; they are read as `Note`, which does nothing.
_NOTES = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "numpy.", "typing.", "argparse.")


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
    content = unpickled(path)
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


def unpickled(path: Path) -> Any:
    """The content of a torch file, left on disk where it can be, by torch's restricted unpickler."""
    try:
        open_regular(path).close()  # a pipe would block
        archive = zipfile.is_zipfile(path)
        if archive:
            with zipfile.ZipFile(path) as files:
                if not any(name.endswith("data.pkl") for name in files.namelist()):
                    raise InputError(f"{path} is an archive of other files; unpack it and give the checkpoint inside.")
        unsafe = get_unsafe_globals_in_checkpoint(path) if archive else []
        refused = sorted(name for name in unsafe if not name.startswith(_NOTES))
        if refused:
            raise InputError(
                f"{path} holds more than data and was not opened: it refers to {', '.join(refused[:5])}, which could "
                "run any code; convert it to .safetensors where you trust it."
            )
        with safe_globals([(Note, name) for name in unsafe]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except InputError:
        raise
    except Exception as error:
        reason = unreadable(path, error)
        raise InputError(f"{path} cannot be read as plain tensors ({reason}); use another file.") from error


def network_weights(path: Path, weights: str) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """The averaged or the other weights of a network, which they are, and what the file holds of its arguments."""
    if path.suffix == ".pkl":
        if weights != "averaged":
            raise InputError(f"{path} holds no {weights} weights; choose the others by --weights.")
        state, own = read_network(path)
        return state, weights, own
    content: Any = read_weights(path)[0] if path.suffix == ".safetensors" else unpickled(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds no tensors by name; give a file of weights.")
    kinds = {"averaged": "ema", "raw": "model"}
    if not any(isinstance(content.get(kind), Mapping) for kind in kinds.values()):
        state, used = content.get("state_dict", content), "averaged"
    elif isinstance(content.get(kinds[weights]), Mapping):
        state, used = content[kinds[weights]], weights
    else:
        raise InputError(f"{path} holds no {weights} weights; choose the others by --weights.")
    plain = {str(name).removeprefix("module."): tensor for name, tensor in state.items()}
    if strange := [name for name, tensor in plain.items() if not isinstance(tensor, Tensor)]:
        raise InputError(f"{path}: {strange[0]} is no tensor; give a file of weights.")
    return plain, used, {}


class Inert:
    """Any other object of the file: it keeps its state and does nothing."""

    state: Any = None
    name: str = ""  # of the class, of a persistent object

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...  # subclasses of dict

    def append(self, value: Any) -> None: ...  # and of list

    def extend(self, values: Any) -> None: ...


def _persistent(meta: Any) -> Inert:
    found = Inert()
    if isinstance(meta, Mapping):
        found.state, found.name = meta.get("state"), str(meta.get("class_name"))
    return found


def _storage(content: bytes) -> Any:
    return torch.load(BytesIO(content), map_location="cpu", weights_only=True)


_KNOWN = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Nothing is imported."""
        return _KNOWN.get((module, name)) or Inert


def read_network(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """The tensors of the averaged network, and the plain arguments of its class with its name as `precond`."""
    try:
        with open_regular(path) as file:
            content = _Reader(file).load()
    except Exception as error:  # a damaged pickle may raise anything
        raise InputError(f"{path} cannot be read as a network's pickle ({unreadable(path, error)}).") from error
    network = content.get("ema") if isinstance(content, Mapping) else None
    if not isinstance(network, Inert) or not isinstance(network.state, Mapping):
        raise InputError(f"{path} holds no averaged network (ema); give a pickle as EDM and EDM2 publish them.")
    given = network.state.get("_init_kwargs")
    plain = {str(k): v for k, v in given.items() if _is_plain(v)} if isinstance(given, Mapping) else {}
    return dict(_tensors(network, "")), {"precond": network.name, **plain}


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _tensors(module: Inert, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """As `state_dict`: parameters and persistent buffers by name."""
    parts = {kind: _mapping(module.state, kind) for kind in ("_parameters", "_buffers", "_modules")}
    left_out = module.state.get("_non_persistent_buffers_set") if isinstance(module.state, Mapping) else None
    for name, tensor in {**parts["_parameters"], **parts["_buffers"]}.items():
        if isinstance(tensor, Tensor) and not (isinstance(left_out, set) and name in left_out):
            yield f"{prefix}{name}", tensor
    for name, child in parts["_modules"].items():
        if isinstance(child, Inert):
            yield from _tensors(child, f"{prefix}{name}.")


def _mapping(state: Any, kind: str) -> Mapping[str, Any]:
    found = state.get(kind) if isinstance(state, Mapping) else None
    return found if isinstance(found, Mapping) else {}
