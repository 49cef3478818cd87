"""Networks compiled block by block, in place: names of tensors stay, and blocks of one shape share their graphs.

A network declares its blocks with `region`. Each becomes one graph for any number of images (one for a single image);
other sizes, no gradients and another precision are graphs of their own, made when they first come.
"""

import logging
from collections.abc import Iterator
from functools import cache, partial
from types import FunctionType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Choice = bool | Literal["auto"]
TrainingChoice = Choice | Literal["cuda_graphs"]
BACKEND: Any = "inductor"
_GRAPHS = 64  # of one region: sizes, with and without gradients, precisions
_log = logging.getLogger(__name__)
_REGIONS: dict[type, str] = {}  # class => its compiled method
M = TypeVar("M", bound=type)


def region(kind: M, method: str = "forward") -> M:
    """Declares that a network's class is compiled as one graph; a decorator."""
    _REGIONS[kind] = method
    return kind


def regions(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The outermost regions of a network with their methods; a synchronised norm waits for others, so it has none."""
    method = next((_REGIONS[kind] for kind in type(module).__mro__ if kind in _REGIONS), None)
    if method is not None and not any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        yield module, method
    if method != "forward":
        for child in module.children():
            yield from regions(child)


def wanted(choice: TrainingChoice, device: torch.device) -> bool:
    """auto: on a GPU; on a CPU the wait is longer than what most runs gain."""
    return device.type == "cuda" if choice == "auto" else bool(choice)


def compile_regions(*networks: nn.Module, cuda_graphs: bool = False) -> int:
    """Compile the regions of the networks, when they are first called; the number of regions.

    cuda_graphs: calls with gradients are recorded and replayed, so that a region is one launch. Who calls them states
    where a step begins, by `torch.compiler.cudagraph_mark_step_begin`: what a region gave is kept until then.
    """
    found = {module: method for network in networks for module, method in regions(network)}
    if found:
        from torch import _dynamo, _functorch

        _dynamo.config.recompile_limit = max(_dynamo.config.recompile_limit, _GRAPHS)
        _dynamo.config.optimize_ddp = False  # gradients are sent region by region as it is
        _functorch.config.donated_buffer = False  # the adversary's weight runs parts of the backward pass twice
    for module, method in found.items():
        kind: Any = type(module)
        shapes = tuple(parameter.shape for parameter in module.parameters())
        modes = (None, "reduce-overhead" if cuda_graphs else None)  # without and with gradients
        variants = tuple(_compiled(kind, method, shapes, BACKEND, mode) for mode in modes)
        setattr(module, method, partial(_call, variants, module, method))
    return len(found)


def seconds() -> float:
    """Time that this process has spent on compiling so far."""
    from torch._dynamo.utils import calculate_time_spent

    return calculate_time_spent().get("total_wall_time", 0.0)


@cache
def _compiled(kind: type, method: str, shapes: tuple[torch.Size, ...], backend: Any, mode: str | None) -> Any:
    """The method, compiled for all modules of these shapes: torch keeps graphs by code object, and tries each in turn,
    so that all regions in one list would make every call slow."""
    own = getattr(kind, method)

    def run(module: nn.Module, *args: Any, **options: Any) -> Any:
        return own(module, *args, **options)

    code = run.__code__.replace(co_name=f"{kind.__name__}_{_compiled.cache_info().misses}")
    function = FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode)


def _call(variants: tuple[Any, Any], module: nn.Module, method: str, *args: Any, **options: Any) -> Any:
    """The number of images, the first axis of every tensor, is left open; everything else is part of the graph."""
    for value in (*args, *options.values()):
        _open(value)
    try:
        return variants[torch.is_grad_enabled()](module, *args, **options)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        _log.warning("%s has %d graphs, for as many sizes; it runs uncompiled from here on", type(module), _GRAPHS)
        delattr(module, method)
        return getattr(module, method)(*args, **options)


def _open(value: Any) -> None:
    if isinstance(value, Tensor):
        if value.ndim:
            torch._dynamo.maybe_mark_dynamic(value, 0)
    elif isinstance(value, list | tuple):
        for part in value:
            _open(part)
