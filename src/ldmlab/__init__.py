"""ldmlab: latent diffusion models, trained and scored as in the paper."""

from typing import Any

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`ldmlab.load`, imported on first use: torch takes seconds to load and many commands need none of it."""
    if name == "load":
        from ldmlab.build import load

        return load
    raise AttributeError(f"module 'ldmlab' has no attribute {name!r}")
