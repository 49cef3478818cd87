"""Conditioners from configuration: trained text towers are taken up, widths are added."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ldmlab.app.stored_states import check_states
from ldmlab.build import read_clip
from ldmlab.contracts import LatentSpec
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts, instantiate


@dataclass(frozen=True)
class Conditioners:
    """The conditioners in config order, and the nodes from which model.yaml rebuilds them without the runs."""

    modules: dict[str, Any]
    nodes: dict[str, dict[str, Any]]


def build_conditioners(config: Mapping[str, Mapping[str, Any]], latent: LatentSpec) -> Conditioners:
    """One module a name; those that scale images down are told by how much."""
    modules, nodes = {}, {}
    for name, node in config.items():
        modules[name], nodes[name] = _build(name, dict(node), latent)
    return Conditioners(modules, nodes)


def _build(name: str, node: dict[str, Any], latent: LatentSpec) -> tuple[nn.Module, dict[str, Any]]:
    """The module and its node; `from_run` names a CLIP run whose text tower is taken up."""
    where = f"conditioner.{name}"
    run = node.pop("from_run", None)
    if run is not None:
        files = read_clip(run)
        node["config"] = files.spec["clip"]["config"]
    if accepts(node, "downsampling", where=where):
        node["downsampling"] = latent.downsampling
    module = instantiate(node, where=where)
    if run is not None:
        module.tower.load_clip(files.parts["clip"])
    return module, getattr(module, "node", node)


def check_fields_given(modules: Mapping[str, Any], data: ShardData) -> None:
    """Every field that a conditioner reads comes with the data or from the task; stored states are its own."""
    given = set(data.fields) | (set() if data.latents else {"image"})
    if data.task:
        given |= data.task.adds | data.task.needs
    for name, module in modules.items():
        missing = sorted(module.reads - given)
        if missing:
            raise InputError(
                f"conditioner={name} reads {', '.join(missing)}, which neither data.fields={list(data.fields)} nor the "
                "task gives; name it in data.fields, or choose the task= that derives it."
            )
    check_states(modules, data)


def class_bound(modules: Mapping[str, Any]) -> int | None:
    """Number of classes that every conditioner of class_id has a vector for; None where none reads it."""
    counts = [getattr(module, "classes", None) for module in modules.values() if "class_id" in module.reads]
    return min((count for count in counts if isinstance(count, int)), default=None)


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
