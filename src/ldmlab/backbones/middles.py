"""Which features of a backbone an encoder's are compared with (`contracts.Backbone.aligned`)."""

from torch import nn

from ldmlab.errors import InputError


def chosen_block(depth: int, block: int | None) -> int:
    """The number, from 1, of a transformer's block; None: 2 / 7 of the depth, rounded up."""
    block = -(-2 * depth // 7) if block is None else block
    if not 1 <= block <= depth:
        raise InputError(f"alignment.block={block} is no block of 1 .. {depth}; choose one of them.")
    return block


def only_middle(block: int | None, middle: nn.Module) -> nn.Module:
    """The module; InputError for another block."""
    if block is not None:
        raise InputError(f"alignment.block={block}: of a U-Net its middle is aligned; leave it out.")
    return middle
