"""Conditioners from configuration: trained text towers are taken up, widths are added."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldmlab.build import read_clip
from ldmlab.contracts import LatentSpec
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate


@dataclass(frozen=True)
class Conditioners:
    """The conditioners in config order, and the nodes from which model.yaml rebuilds them without the runs."""

    modules: dict[str, Any]
    nodes: dict[str, dict[str, Any]]


def build_conditioners(config: Mapping[str, Mapping[str, Any]]) -> Conditioners:
    """One module a name."""
    modules, nodes = {}, {}
    for name, node in config.items():
        modules[name], nodes[name] = _build(name, dict(node))
    return Conditioners(modules, nodes)


def _build(name: str, node: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its node; `from_run` names a CLIP run whose text tower is taken up."""
    where = f"conditioner.{name}"
    run = node.pop("from_run", None)
    if run is not None:
        files = read_clip(run)
        node["config"] = files.spec["clip"]["config"]
    module = instantiate(node, where=where)
    if run is not None:
        module.tower.load_clip(files.parts["clip"])
    return module, getattr(module, "node", node)


def context_widths(conditioners: Conditioners, latent: LatentSpec) -> dict[str, int]:
    """Width of each slot: spatial channels add up, tokens and vectors must agree."""
    widths = {"tokens": 0, "spatial": 0, "vector": 0}
    for name, module in conditioners.modules.items():
        width = module.width(latent)
        if module.slot == "spatial":
            widths["spatial"] += width
        elif widths[module.slot] not in (0, width):
            raise InputError(
                f"conditioner.{name} gives {module.slot} of width {width}, another one {widths[module.slot]}; "
                "conditioners of one slot need one width."
            )
        else:
            widths[module.slot] = width
    return widths
