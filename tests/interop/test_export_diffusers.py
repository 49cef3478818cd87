"""What is exported loads in diffusers' own pipelines and is the same network; what cannot be is refused."""

from pathlib import Path

import pytest
from exported_models import MODULES, PIPELINES, model, weights

from ldmlab.interop.diffusers_export import export_folder


@pytest.mark.parametrize("name", [*PIPELINES, *MODULES])
def test_every_part_is_the_same_function(name: str, tmp_path: Path) -> None:
    spec = model(name, tmp_path)
    what, differences = export_folder(spec, weights(spec), tmp_path / "out")
    assert what.split()[0] == PIPELINES.get(name, "modules")
    assert max(differences.values()) < 2e-5, differences
