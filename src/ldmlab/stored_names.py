"""Names of what commands wrote, for those that read it: fields in latent shards, files beside samples; no torch."""

import re
from pathlib import Path

STATES_PREFIX = "states."  # and the name of a conditioner: batch field of its output, stored with the encoded latents
ENCODER_PREFIX = "encoder."  # instead of a conditioner's name: and the name of an encoder, whose features are stored
IDS_PREFIX, CUT_PREFIX = "ids.", "cut."  # likewise: the caption as token numbers, and whether its end is lost


def maker_of(states: str) -> str:
    """The option of what made stored states: conditioner.NAME, or encoder.NAME."""
    return states if states.startswith(ENCODER_PREFIX) else f"conditioner.{states}"


_BESIDE = re.compile(r"(grid|sweep_.+|trajectory|\d+(_.+)?_trajectory)\.png|\d+_trajectory\.webp")


def is_overview(path: Path) -> bool:
    """Whether a file is a grid, sweep or trajectory that `ldmlab sample` wrote beside samples, by their names."""
    if _BESIDE.fullmatch(path.name) is None:
        return False
    return any(_BESIDE.fullmatch(first.name) is None for first in path.parent.glob("000000*.png"))
