"""What a part of each configuration group must have, and how large it may be, checked when it is built."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as registration

from ldmlab import contracts, distributed
from ldmlab.errors import InputError, memory_ran_out, shown

LARGEST = 2**31  # of whole numbers of a network
_PIECES = 50_000  # modules and tensors of one part; published networks have a few thousand

CONTRACTS: dict[str, type] = {  # configuration group => what its parts must have
    "first_stage": contracts.FirstStage,
    "data": contracts.Data,
    "backbone": contracts.Backbone,
    "conditioner": contracts.Conditioner,
    "schedule": contracts.Schedule,
    "prediction": contracts.Prediction,
    "time_sampling": contracts.TimeSampling,
    "weighting": contracts.Weighting,
    "diffusion_loss": contracts.DiffusionLoss,
    "sampler": contracts.NamedSampler,
    "guider": contracts.Guider,
    "task": contracts.Task,
    "loss": contracts.AutoencoderLoss,
    "metric": contracts.Metric,
    "features": contracts.FeatureExtractor,
    "encoder": contracts.PatchEncoder,
    "optimizer": contracts.OptimizerFactory,
    "lr_schedule": contracts.LrSchedule,
}


@cache
def members(contract: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that a Protocol demands: methods, and attributes or properties."""
    bases = [base for base in contract.__mro__ if getattr(base, "_is_protocol", False) and base is not Protocol]
    every = ((name, value) for base in bases for name, value in vars(base).items())
    public = {name: value for name, value in every if not name.startswith("_") or name == "__call__"}
    methods = tuple(name for name, value in public.items() if callable(value))
    properties = (name for name, value in public.items() if isinstance(value, property))
    return methods, (*(name for base in bases for name in base.__annotations__), *properties)


def check_part(part: Any, contract: type, where: str, name: str) -> None:
    """InputError naming what the part lacks of its contract."""
    methods, attributes = members(contract)
    lacking = [f"{method}()" for method in methods if not callable(getattr(part, method, None))]
    lacking += [one for one in attributes if not (hasattr(type(part), one) or hasattr(part, one))]
    if lacking:
        raise InputError(
            f"{where}: {name} has no {', '.join(lacking)}, which every {contract.__name__} needs "
            "(see ldmlab.contracts and docs/extending.md)."
        )


def made(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    """What the target makes; an error of numbers, or with which an outside class refuses options, is an InputError."""
    numbers = dict(_numbers(arguments, where))
    largest = max(numbers, key=lambda key: numbers[key], default="")
    which = f"{largest}={numbers[largest]}" if numbers else where
    try:
        with _bounded(which):
            return target(**arguments)
    except InputError:
        raise
    except Exception as error:
        if memory_ran_out(error):
            raise InputError(f"{which}: there is no memory for a part of this size; choose a smaller one.") from error
        divided = isinstance(error, ZeroDivisionError)
        odd = [key for key, value in numbers.items() if not 0 <= value <= LARGEST or (divided and value == 0)]
        if odd and isinstance(error, ArithmeticError | IndexError | RuntimeError | TypeError | ValueError):
            given = ", ".join(f"{key}={numbers[key]}" for key in odd)
            reason = shown(" ".join(str(error).split()))
            raise InputError(f"{given}: no part can be built so ({reason}); choose another number.") from error
        refused = isinstance(error, ValueError | ImportError) or type(error).__name__ == "MisconfigurationException"
        if not refused or str(getattr(target, "__module__", "")).partition(".")[0] == "ldmlab":
            raise
        name = getattr(target, "__qualname__", target)
        raise InputError(f"{where}: {name} refuses its options ({shown(str(error))}); change them.") from error


def _numbers(value: Any, where: str) -> Iterator[tuple[str, int | float]]:
    """The numbers among arguments, also inside mappings and lists, by their options."""
    if type(value) in (int, float):
        yield where, value
    for key, part in value.items() if isinstance(value, Mapping) else ():
        yield from _numbers(part, f"{where}.{key}")
    for part in value if isinstance(value, list | tuple) else ():
        yield from _numbers(part, where)


@contextmanager
def _bounded(which: str) -> Iterator[None]:
    """Inside, a part that grows beyond any network, or beyond the memory of this machine, is an InputError."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory *= distributed.world_size() if distributed.joined() else 1  # FSDP keeps a part of each weight here
    pieces = weights = 0

    def added(module: nn.Module, name: str, new: torch.Tensor | nn.Module | None) -> None:
        nonlocal pieces, weights
        pieces += new is not None
        if isinstance(new, torch.Tensor) and new.device.type == "cpu":
            weights += new.nbytes
        if pieces > _PIECES:
            raise InputError(f"{which}: a part of more than {_PIECES:,} layers and weights; choose a smaller one.")
        if weights > memory:
            raise InputError(f"{which}: there is no memory for a part of this size; choose a smaller one.")

    with on_registration(added):
        yield


@contextmanager
def on_registration(added: Callable[[nn.Module, str, Any], None]) -> Iterator[None]:
    """Inside, `added` sees each parameter, buffer and module that any module gets."""
    handles = [
        registration.register_module_parameter_registration_hook(added),
        registration.register_module_buffer_registration_hook(added),
        registration.register_module_module_registration_hook(added),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
