"""What first stages of ours can have and those of no other program."""

from collections.abc import Mapping
from typing import Any

from ldmlab.errors import InputError


def refuse_cosine(node: Mapping[str, Any]) -> None:
    """Codes of unit length are ours alone: other programs would decode with other vectors."""
    if node.get("cosine"):
        raise InputError("first_stage.cosine=true exists only in ldmlab; export it with --format ldmlab.")


def only_ours(name: str) -> bool:
    """Counters of codebook options that no official first stage has."""
    return name.startswith("quantiser.") and name != "quantiser.codebook.weight"
