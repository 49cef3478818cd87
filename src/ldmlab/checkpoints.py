"""Files of tensors: written atomically, read without running code."""

import hashlib
import os
import re
import threading
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from ldmlab import sharded
from ldmlab.disks import open_regular
from ldmlab.errors import InputError, first_line
from ldmlab.files import write_atomically

_KINDS = (  # first bytes of a file => what it is and what to do
    (b"version https://git-lfs", "it is a Git LFS pointer in place of the file; run `git lfs pull`"),
    (b"PK\x03\x04", "it is an archive as torch.save writes them, of which a part is missing or damaged"),
    (b"\x80", "it is a pickle"),
    (b"<", "it is a web page in place of the file; download the file itself"),
    (b"\x1f\x8b", "it is gzip-compressed; unpack it"),
    (b"\x28\xb5\x2f\xfd", "it is zstd-compressed; unpack it"),
    (b"7z\xbc\xaf", "it is a 7z archive; unpack it"),
    (b"Rar!", "it is a RAR archive; unpack it"),
    (b"\x89HDF", "it is an HDF5 file"),
    (b"GGUF", "it is a GGUF file"),
    (b"\x89PNG", "it is an image"),
    (b"\xff\xd8\xff", "it is an image"),
    (b"{", "it is a JSON text"),
    (b"\0" * 16, "it begins with zeros, as an unfinished download does"),
)


def unreadable(path: Path, error: Exception) -> str:
    """Why a file of tensors cannot be read: the kind of file recognised from its first bytes, else the error."""
    try:
        with open_regular(path) as file:
            start, size = file.read(64), path.stat().st_size
    except OSError as failed:
        return failed.strerror or str(failed)
    if not start:
        return "it is empty"
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < 100_000_000:
        cut = f"; it ends after {size} bytes, within its header" if size < 8 + header else ""
        return f"it is a safetensors file{cut}" if path.suffix != ".safetensors" else f"{_reason(error)}{cut}"
    if wanted := re.search(r"(?:GLOBAL|global:?) ([\w.]+)", str(error)):  # by torch's reader of plain data
        return f"it refers to {wanted[1]}, which could run any code"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((kind for first, kind in _KINDS if text.startswith(first) or start.startswith(first)), _reason(error))


def _reason(error: Exception) -> str:
    """The reason in torch's message, without its advice to load with weights_only=False."""
    return first_line(error).partition("Weights only load failed")[0].strip() or "more than plain tensors, or damaged"


_CHUNK_BYTES = 2**20


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain types to a file that `torch.load(weights_only=True)` reads."""
    write_atomically(path, lambda temporary: _torch_save(content, temporary))


def _torch_save(content: dict[str, Any], path: Path) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's zip writer hides the errno of a full disk
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def load_checkpoint(path: Path, *, lazily: bool = False, process: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The content of a checkpoint on the CPU; InputError when it is missing, damaged or holds more than data.

    Every byte is checked against the checksums that torch.save writes into the file and torch.load ignores, the content
    against its inventory where it has one. A checkpoint may be a folder of shards (`sharded.py`).

    lazily: tensors stay in the file until they are used, in memory that all processes of a machine share; those of
    shards are `StoredTensor`s.
    process: rank and number of those that read it together: the first one checks the file, each one its shards.
    """
    folder = path if path.is_dir() else None
    file = path / sharded.STATE if folder else path
    if not file.is_file():
        raise InputError(f"{file} does not exist; give the path of a checkpoint or of a run folder.")
    try:
        if process[0] == 0:
            _check_sums(file)
        mapped = (lazily or folder is not None) and zipfile.is_zipfile(file)  # else torch speaks of mmap alone
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except Exception as error:
        raise InputError(
            f"{path} cannot be read as a checkpoint ({unreadable(file, error)}); use another one."
        ) from error
    if process[0] == 0:
        _check_inventory(path, content)
    try:
        content = sharded.attach(content, folder, process)
    except Exception as error:
        raise InputError(f"{path} cannot be read as a checkpoint ({_reason(error)}); use another one.") from error
    return content if lazily else sharded.whole(content)


def in_host_memory(content: Any) -> Any:
    """The same structure, its tensors copied: those of a GPU to pinned memory. What shared memory shares it still."""
    copies: dict[Any, Tensor] = {}
    on_gpu: set[bool] = set()

    def copied(value: Any, _: str) -> Any:
        if not isinstance(value, Tensor) or value.is_meta:
            return value
        key = (value.untyped_storage()._cdata, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if key not in copies:
            host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            copies[key] = host.copy_(value.detach(), non_blocking=True)
            on_gpu.add(value.is_cuda)
        return copies[key]

    result = sharded.mapped(content, copied)
    if True in on_gpu:
        torch.cuda.synchronize()
    return result


def _check_sums(path: Path) -> None:
    """The CRC-32 of every record of a file that torch.save wrote; ValueError for the first that differs."""
    if not zipfile.is_zipfile(path):
        return  # torch.load names what it is instead
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.file_size != record.compress_size:
                raise ValueError(f"its record {record.filename} is compressed")
            with archive.open(record) as file:
                while file.read(_CHUNK_BYTES):
                    pass


def inventory(content: Any) -> str:
    """Two hashes, by which missing parts and other weights are noticed.

    The first is of names, types, shapes and plain values, the second of each tensor's sum as integers.
    """
    parts, sums = hashlib.sha256(), hashlib.sha256()

    def add(value: Any, path: str) -> None:
        what = ""
        if isinstance(value, Mapping | list | tuple):
            named = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, part in named:
                add(part, f"{path}/{name}")
        elif isinstance(value, Tensor):
            what = f"{value.dtype} {tuple(value.shape)}"
            sums.update(f"{path} {_sum(value)};".encode())
        else:
            what = repr(value)
        parts.update(f"{path} {type(value).__name__} {what};".encode())

    add(content, "")
    return f"{parts.hexdigest()[:16]}:{sums.hexdigest()[:16]}"


def _sum(tensor: Tensor) -> int:
    """Of the numbers' bytes in their order, as integers of 8 bytes and the rest."""
    if tensor.is_meta:
        return 0
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # expanded: it may grow to any size
        tensor = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # else they are no integers where they lie
    whole = len(flat) // 8 * 8
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())


def _check_inventory(path: Path, content: dict[str, Any]) -> None:
    """InputError where the content is not what it was saved with; early inventories had the first hash only."""
    saved = str(content.get("inventory", ""))
    now = inventory({name: part for name, part in content.items() if name != "inventory"}) if saved else ""
    if saved[:16] != now[:16]:
        raise InputError(f"{path} lacks a part that it was saved with (its inventory differs); use another one.")
    if saved not in (now, now[:16]):
        raise InputError(f"{path} holds other weights than it was saved with (their sums differ); use another one.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A state dict to a .safetensors file, which cannot hold tensors that share memory: those are copied."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    count = Counter(tensor.untyped_storage().data_ptr() for tensor in plain.values())
    shared = {name: t.clone() for name, t in plain.items() if count[t.untyped_storage().data_ptr()] > 1}

    def save(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(plain | shared, temporary, {"format": "pt", **(metadata or {})})
        except safetensors.SafetensorError as error:  # its writer has the errno only as text
            if number := re.search(r"os error (\d+)", str(error)):
                raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
            raise

    write_atomically(path, save)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors file, on the CPU."""
    if not path.is_file():
        raise InputError(f"{path} is missing; export or copy the model folder again.")
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({unreadable(path, error)}); export or copy it again.") from error


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules that this thread builds inside have no memory for parameters until `fill`; their buffers are real."""
    thread = threading.get_ident()

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or threading.get_ident() != thread:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]  # it takes what is returned
    try:
        yield
    finally:
        handle.remove()


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Our names, all of them, as float32; tensors that are so already are not copied. The caller has checked them."""
    module.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
        assign=True,
    )


def load_exactly(module: nn.Module, tensors: Mapping[str, Any], source: str) -> None:
    """Tensors into a module; names and shapes must match exactly, else InputError with counts.

    They are copied, to each process its part where the module is sharded, or taken over by a module that was built
    `without_weights`.
    """
    own = check_fit(module, tensors, source)
    if any(parameter.is_meta for parameter in module.parameters()):
        fill(module, tensors)
    else:
        module.load_state_dict({name: sharded.laid_out(tensor, own[name]) for name, tensor in tensors.items()})


def check_fit(module: nn.Module, tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The module's own tensors; InputError where the names or shapes of the given ones differ."""
    own = module.state_dict()
    missing, extra = own.keys() - tensors.keys(), tensors.keys() - own.keys()
    shapes = [name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape]
    if missing or extra or shapes:
        example = min([*missing, *extra, *shapes])
        raise InputError(
            f"{source} does not fit the network: {len(missing)} tensors missing, {len(extra)} unknown, "
            f"{len(shapes)} of another shape (such as {example}); use the configuration it was trained with."
        )
    return own


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes, dtypes and values: 16 hex digits that do not depend on the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()[:16]
