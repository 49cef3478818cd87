"""Origin of an artefact: the command, the code's commit and the versions that made it."""

import importlib.metadata
import platform
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from ldmlab import plugins

_PACKAGES = ("ldmlab", "torch", "torchvision", "pytorch-lightning", "webdataset", "open_clip_torch", "numpy", "Pillow")


def provenance() -> dict[str, Any]:
    """The command line, commit (with `-dirty`), versions and time, plain types only.

    `plugins`: packages from outside of which this process has built parts so far.
    """
    packages = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": packages,
        **({"plugins": versions} if (versions := plugins.versions()) else {}),
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@cache  # the code of a process stays what it was when it was read
def _commit() -> str | None:
    """The commit of the checkout this code runs from; None for an installed wheel."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        result = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
