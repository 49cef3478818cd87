"""Tensors of NVlabs' network pickles (EDM, EDM2), without running what such a file names.

A network lies there as `torch_utils.persistence` writes it: its source as text, the state of each module as a dict.
Every class and function of the file becomes `Inert`, but for those that rebuild a tensor from bytes.
"""

import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch._utils import _rebuild_tensor_v2

from ldmlab.disks import open_regular
from ldmlab.errors import InputError
from ldmlab.file_kinds import unreadable
from ldmlab.interop.renaming import StateDict


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
