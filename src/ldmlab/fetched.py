"""Where files that others publish lie once they are fetched."""

import os
from pathlib import Path


def weights_folder() -> Path:
    """LDMLAB_WEIGHTS or ~/.cache/ldmlab."""
    return Path(os.environ.get("LDMLAB_WEIGHTS") or Path.home() / ".cache" / "ldmlab")
