"""The artefacts of the version before, unpacked for a test; paths in them are relative to the folder."""

import json
import tarfile
from pathlib import Path
from typing import Any

import yaml

from ldmlab import format1

ASSETS = Path(__file__).parent / "assets" / "format1"
EXPECTED: dict[str, Any] = json.loads((ASSETS / "expected.json").read_text())


def unpack(folder: Path) -> Path:
    """images, latents, first_stage and model (runs stopped at step 4), exported (a model folder)."""
    with tarfile.open(ASSETS / "artefacts.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def config_of(run: Path) -> dict[str, Any]:
    """The run's configuration in today's names."""
    return format1.config(yaml.safe_load((run / "config.yaml").read_text()))
