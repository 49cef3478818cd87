"""Names and shapes of a stranger's tensors against those a network asks for: all or nothing."""

from collections.abc import Mapping

from torch import Tensor

from ldmlab.errors import InputError

_SHOWN = 8  # names of each kind in a message


def check_keys(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """InputError that lists missing, unexpected and misshapen tensors; the axes of size 1 of a projection are free."""
    missing = sorted(expected.keys() - given.keys())
    unexpected = sorted(given.keys() - expected.keys())
    misshapen = [
        f"{key} {_text(given[key])} instead of {_text(expected[key])}"
        for key in sorted(expected.keys() & given.keys())
        if _squeezed(given[key]) != _squeezed(expected[key])
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    told = [f"{len(names)} {fault} ({_listed(names)})" for fault, names in faults.items() if names]
    if told:
        raise InputError(
            f"the weights do not fit {what}: {'; '.join(told)}; use the configuration that belongs to them."
        )


def _squeezed(tensor: Tensor) -> tuple[int, ...]:
    """The shape up to trailing axes of size 1, which tell a 1 x 1 convolution from a linear layer."""
    shape = list(tensor.shape)
    while len(shape) > 2 and shape[-1] == 1:
        shape.pop()
    return tuple(shape)


def _text(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
