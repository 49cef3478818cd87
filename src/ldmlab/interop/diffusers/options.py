"""Reading a diffusers `config.json`: defaults filled in, options that change the function and that we lack refused."""

from collections.abc import Mapping
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


def _plain(value: Any) -> Any:
    """Tuples as lists, as they come from a file."""
    return list(value) if isinstance(value, tuple) else value
