"""Tensors that were given beside those a network has: what differs, told in one message."""

from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

from torch import Tensor

from ldmlab.errors import InputError

_LISTED = 30  # names of one sort in a message


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
