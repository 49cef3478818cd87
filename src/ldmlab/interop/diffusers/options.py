"""Reading a diffusers `config.json`: defaults filled in, options that change the function and that we lack refused."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldmlab.errors import InputError

# Keys that describe the file or the hardware and change no output.
_NEUTRAL = frozenset(
    ("sample_size", "upcast_attention", "force_upcast", "addition_embed_type_num_heads", "num_train_timesteps")
)


def resolved(
    config: Mapping[str, Any],
    kind: str,  # diffusers' class, for messages
    defaults: Mapping[str, Any],  # every option we read, with the value of diffusers' signature
    required: Mapping[str, tuple[Any, ...]],  # options we have no choice in: the values we can do, diffusers' first
) -> dict[str, Any]:
    """The options we read; InputError for one that asks for something we do not have, known to us or not."""
    for key, value in config.items():
        if key.startswith("_") or key in _NEUTRAL or key in defaults:
            continue
        allowed = required.get(key, (None, False))
        if _plain(value) not in allowed:
            can = " or ".join(map(str, allowed))
            raise InputError(f"{kind} with {key}={value} cannot be represented here; only {key}={can} can.")
    return {key: _plain(config.get(key, default)) for key, default in defaults.items()}


def named_class(config: Mapping[str, Any], known: Iterable[str], part: str) -> str | None:
    """The class that a configuration names, None where it names none; InputError for one that is not known."""
    named = config.get("_class_name")
    if named is not None and named not in known:
        raise InputError(f"{part}'s class {named} is not known; known are {', '.join(known)}.")
    return named


def multiples(kind: str, widths: Sequence[int]) -> list[int]:
    """Widths of levels as multiples of the first."""
    if any(width % widths[0] for width in widths):
        raise InputError(f"{kind} with block_out_channels={widths}: not multiples of the first width; use another one.")
    return [width // widths[0] for width in widths]


def levels_with_attention(
    kind: str,
    given: Mapping[str, Any],
    attention: str,  # how the names of levels with attention begin
    known: Iterable[str],  # names of levels that we have
) -> list[bool]:
    """Which levels have attention, from the finest; the way up must mirror the way down."""
    types = given["down_block_types"], given["up_block_types"]
    for name in [*types[0], *types[1]]:
        if name not in known:
            raise InputError(
                f"{kind} with a {name} cannot be represented here; levels can be {', '.join(sorted(known))}."
            )
    down, up = ([name.startswith(attention) for name in way] for way in types)
    if down != up[::-1]:
        raise InputError(f"{kind} with other attention on the way up ({types[1]}) than down; use a symmetric one.")
    return down


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come from a file."""
    return list(value) if isinstance(value, tuple) else value
