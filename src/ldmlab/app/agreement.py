"""What task, conditioners and data say of the same thing: derived where one is silent, refused where they disagree."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.instantiate import accepts

if TYPE_CHECKING:
    from ldmlab.evaluation.protocol import Protocol

Config = Mapping[str, Any]


def with_classes_of(config: Config, data: ShardData) -> Config:
    """Where a task or a conditioner of boxes leaves `classes` open: those that the data's manifest names."""
    names = _names_of_boxes(config, data)
    if names is None:
        return config
    told = {
        name: {**node, "classes": len(names), "names": names} if _open(node, f"conditioner.{name}") else node
        for name, node in config["conditioner"].items()
    }
    task = {**config["task"], "classes": len(names)} if _open(config["task"], "task") else config["task"]
    return {**config, "conditioner": told, "task": task}


def _names_of_boxes(config: Config, data: ShardData) -> list[str] | None:
    """Names by class_id of the boxes; those of whole images say nothing of boxes."""
    if not any(_open(node, "conditioner") for node in config["conditioner"].values()):
        return None
    manifest = data.manifest("train")
    return manifest.classes if "boxes" in manifest.fields and "class_id" not in manifest.fields else None


def _open(node: Any, where: str) -> bool:
    return bool(node) and node.get("classes", 0) is None and accepts(node, "classes", where=where)


def check_agreement(task: Any, conditioners: Mapping[str, Any]) -> None:
    """Refuse, before the first step, a task that gives what a conditioner cannot take."""
    for name, module in conditioners.items():
        if task is None or not module.reads & task.adds:
            continue
        most, places = getattr(task, "most", None), getattr(module, "objects", None)
        if most is not None and places is not None and most > places:
            raise InputError(
                f"task.most={most} boxes an image are more than conditioner.{name}.objects={places}; "
                "give both one value."
            )
        told, known = getattr(task, "classes", None), getattr(module, "classes", None)
        if told is not None and known is not None and told > known:
            raise InputError(
                f"task.classes={told}, but conditioner.{name}.classes={known} takes numbers below that; "
                "give both one value."
            )


def scored_task(task: Any, protocol: "Protocol", image_size: int) -> Any:
    """The model's task as a protocol asks for it: at its size, with its options."""
    if not protocol.task and protocol.image_size is None:
        return task
    known = [item.name for item in fields(task)] if task is not None else []
    for name in sorted(protocol.task.keys() - set(known)):
        raise InputError(
            f"protocol.task.{name}: the model's task has no such option (it has {', '.join(known) or 'none'}); choose "
            "the protocol of its own task."
        )
    return task if task is None else replace(task, image_size=image_size, **protocol.task)
