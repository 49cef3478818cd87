"""Networks that are built sharded: no process ever holds all weights of one.

A module's weights are drawn in full, as without sharding, and cut once it is a part of another module. What a
constructor does to weights that are cut already is computed on full ones too, so that all values are those of one
process, bit for bit; it may write to views of them that keep the first axis.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.sharded import laid_out
from ldmlab.training.strategies import mesh_of

_aten = torch.ops.aten
_WRITE_ALL = {_aten.zero_, _aten.fill_, _aten.copy_, _aten.uniform_, _aten.normal_}  # whatever was there before
_LARGE = 2**18  # values of a weight
M = TypeVar("M", bound=nn.Module)


def built_sharded(trainer: Mapping[str, Any], make: Callable[[], M]) -> M:
    """The network that `make` builds, its parameters DTensors where `trainer.strategy` shards it."""
    strategy = trainer.get("strategy")
    if strategy not in ("fsdp", "hsdp") or not distributed.joined():
        return make()
    on_gpu = trainer.get("accelerator") != "cpu" and torch.cuda.is_available()
    mesh = mesh_of("cuda" if on_gpu else "cpu", by_machine=strategy == "hsdp")
    with _FullValues(), _cut_when_registered(mesh):
        network = make()
    cut(network, mesh)
    return network


def cut(module: nn.Module, mesh: DeviceMesh) -> None:
    """DTensors in place of all parameters: this process keeps its rows of each."""
    large = [_cut(part, name, mesh) for part in module.modules() for name in part._parameters]
    if any(large):
        _give_back()


def _cut(part: nn.Module, name: str, mesh: DeviceMesh) -> bool:
    """Whether the parameter was a large one."""
    full = part._parameters[name]
    if full is None or not full.ndim or isinstance(full, DTensor):
        return False
    places = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    rows = distribute_tensor(full.detach(), mesh, places, src_data_rank=None).to_local().clone()
    own = DTensor.from_local(rows, mesh, places, run_check=False, shape=full.shape, stride=full.stride())
    part._parameters[name] = nn.Parameter(own, full.requires_grad)
    return full.numel() >= _LARGE


def _give_back() -> None:
    """Freed memory to the system: glibc would keep what freed weights leave between the shards."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def _cut_when_registered(mesh: DeviceMesh) -> Iterator[None]:
    """Inside, modules that this thread makes parts of others are cut."""
    thread = threading.get_ident()

    def hook(_: nn.Module, name: str, module: nn.Module | None) -> None:
        if module is not None and threading.get_ident() == thread:
            cut(module, mesh)

    handle = register_module_module_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _FullValues(TorchDispatchMode):
    """Inside, operators see full tensors in place of DTensors, and write their results back to the shards."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor not in types:
            return func(*args, **kwargs)
        if func.is_view or func.overloadpacket is _aten.clone:
            return self._same_rows(func, args, kwargs)
        anything = func.overloadpacket in _WRITE_ALL
        full = [
            torch.empty(value.shape, dtype=value.dtype)
            if anything and not index and isinstance(value, DTensor)
            else tree_map_only(DTensor, _full, value)
            for index, value in enumerate(args)
        ]
        result = func(*full, **tree_map_only(DTensor, _full, kwargs))
        if not func._schema.is_mutable:
            return result
        target: Any = args[0]
        if isinstance(target, DTensor):
            own: Any = laid_out(full[0], target)
            target.to_local().copy_(own.to_local())
            del result, full, own
            if target.numel() >= _LARGE:
                _give_back()
        return target

    @staticmethod
    def _same_rows(func: Any, args: Any, kwargs: Any) -> Any:
        source, result = args[0], func(*args, **kwargs)
        if not isinstance(result, DTensor) or result.placements != source.placements:
            raise InputError(
                f"trainer.strategy=fsdp: a network's constructor takes {func} of a weight, which mixes its rows; "
                "initialise the weight before its module becomes a part of another one, or use trainer.strategy=ddp."
            )
        return result


def _full(tensor: Any) -> Tensor:
    return tensor.detach().full_tensor().cpu()
