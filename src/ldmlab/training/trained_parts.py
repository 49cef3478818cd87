"""Phases of training: the parts of a network that are trained, by the beginnings of their parameters' names."""

from collections.abc import Sequence

from torch import nn

from ldmlab.errors import InputError


def train_only(network: nn.Module, parts: Sequence[str], option: str) -> None:
    """Freeze all parameters outside of `parts`, such as decoder or decoder.conv_out, and codes that move by hand.

    InputError for a part that is none, with the names there are.
    """

    def inside(name: str, part: str) -> bool:
        return f"{name}.".startswith(f"{part}.")

    given = dict(network.named_parameters())
    for part in parts or [""]:
        if not any(inside(name, part) for name in given):
            known = sorted({".".join(name.split(".")[:depth]) for name in given for depth in (1, 2)})
            raise InputError(
                f"{option}={list(parts)} names no parameter; there are {', '.join(known)}, and null for all."
            )
    for name, parameter in given.items():
        if not any(inside(name, part) for part in parts):
            parameter.requires_grad_(False)
    for name, module in network.named_modules():
        if getattr(module, "watched", False) and not any(inside(name, part) for part in parts):
            module.watched = False
