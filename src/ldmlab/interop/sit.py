"""The official SiT (willisma/SiT, models.py): DiT's network with times in 0 .. 1 and an unused half of the output."""

from typing import Any

from ldmlab.interop.dit import ARGUMENTS, OfficialTransformer, filled_parts
from ldmlab.interop.renaming import Node, State, refuse_unknown


def as_official(config: Node, state_dict: State) -> OfficialTransformer:
    """The official `SiT(**config)` with these weights: `model(x, t, y)` with t in 0 .. 1, 0 being noise."""
    refuse_unknown(config, ARGUMENTS)
    return OfficialTransformer(filled_parts(config, state_dict, options(config))).eval()


def options(config: Node) -> dict[str, Any]:
    """What SiT changes of our DiT."""
    return {"unused_half": bool(config.get("learn_sigma", True))}
