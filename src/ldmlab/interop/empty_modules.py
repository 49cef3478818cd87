"""Modules without weights, then filled with tensors that are taken over instead of copied: no memory is used twice."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

from torch import Tensor, nn

from ldmlab.errors import InputError

_LISTED = 30  # names of one sort in a message


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules built inside have parameters on the meta device and real buffers (masks and tables are not in files)."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        original(module, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Our names, all of them, as float32; tensors that are so already are not copied. The caller has checked them."""
    module.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()},
        assign=True,
    )


class Mismatch(NamedTuple):
    """How given tensors differ from the ones a network has."""

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


def compare(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], either_rank: Iterable[str] = ()) -> Mismatch:
    """Names and shapes against those expected; for `either_rank` 1 x 1 convolutions and linear layers are the same."""
    loose = set(either_rank)

    def same(name: str) -> bool:
        shape, wanted = tuple(given[name].shape), tuple(expected[name].shape)
        short, long = sorted((shape, wanted), key=len)
        return shape == wanted or (name in loose and long[: len(short)] == short and prod(long[len(short) :]) == 1)

    shared = expected.keys() & given.keys()
    wrong = sorted(name for name in shared if not same(name))
    return Mismatch(
        missing=sorted(expected.keys() - given.keys()),
        unexpected=sorted(given.keys() - expected.keys()),
        misshapen=[f"{name} {list(given[name].shape)} instead of {list(expected[name].shape)}" for name in wrong],
    )


def refuse_mismatch(mismatches: Mapping[str, Mismatch]) -> None:
    """One InputError for all parts that do not fit; nothing when all do."""
    wrong = [f"the {part} has {mismatch} keys" for part, mismatch in mismatches.items() if mismatch]
    if wrong:
        raise InputError(f"{'; '.join(wrong)}; give the configuration that belongs to these weights.")
