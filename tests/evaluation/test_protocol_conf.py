"""Every shipped metric and protocol can be built; a new file is found by its folder."""

from pathlib import Path

import pytest
import yaml
from torchmetrics import Metric

from ldmlab.evaluation.paper_table import paper_tables
from ldmlab.evaluation.protocol import Protocol
from ldmlab.instantiate import accepts, instantiate

CONF = Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize("path", sorted((CONF / "metric").glob("*.yaml")), ids=lambda path: path.stem)
def test_metric(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    derived = {"width": 8} if accepts(node, "width", where="metric") else {}
    assert isinstance(instantiate(node, where="metric", **derived), Metric)


@pytest.mark.parametrize("path", sorted((CONF / "protocol").glob("*.yaml")), ids=lambda path: path.stem)
def test_protocol(path: Path) -> None:
    node = yaml.safe_load(path.read_text())
    chosen = [key for entry in node.pop("defaults") if isinstance(entry, dict) for key in entry]
    metrics = {key.split(".")[-1]: {} for key in chosen}
    protocol = instantiate({**node, "metrics": metrics}, where="protocol")
    assert isinstance(protocol, Protocol)
    assert protocol.name == path.stem
    assert all((CONF / "metric" / f"{name}.yaml").exists() for name in metrics)
    assert protocol.paper_table is None or protocol.paper_table in paper_tables()
