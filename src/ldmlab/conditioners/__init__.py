"""Conditioners: fields of a batch to tokens, spatial channels or a vector; `checked_rate` is for their `drop`."""

from ldmlab.errors import InputError


def checked_rate(drop: float) -> float:
    """A rate in [0, 1); anything else is refused."""
    if not 0 <= drop < 1:
        raise InputError(f"conditioner.drop={drop} is no rate; choose 0 to below 1, for instance 0.1.")
    return drop
