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
from ldmlab.checkpoints import load_exactly, load_tensors, without_weights
from ldmlab.disks import open_regular
from ldmlab.errors import InputError
from ldmlab.file_kinds import unreadable
from ldmlab.instantiate import instantiate
from ldmlab.interop.network_pickles import read_network
from ldmlab.model_files import ModelFiles

if TYPE_CHECKING:
    from ldmlab.diffusion.latent_diffusion import LatentDiffusion


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
