"""Conditioners from configuration, and their consistency with task, data and stored states."""

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ldmlab.argument_types import check_type
from ldmlab.build import read_clip
from ldmlab.contracts import Encode, LatentSpec, PatchEncoder
from ldmlab.data.latent_shards import DTYPE, EncodeStates
from ldmlab.data.shard_data import ShardData, stored_states
from ldmlab.errors import InputError
from ldmlab.evaluation.protocol import Protocol
from ldmlab.instantiate import accepts, instantiate
from ldmlab.nn.pixels import to_float
from ldmlab.stored_names import ENCODER_PREFIX, maker_of

Config = Mapping[str, Any]


Built = tuple[dict[str, Any], dict[str, dict[str, Any]]]  # modules; nodes of model.yaml that need no run; by name


def build_conditioners(config: Mapping[str, Mapping[str, Any]], latent: LatentSpec) -> Built:
    """One module a name; those that scale images down get the factor, `from_run` is a CLIP run whose tower to use."""
    modules: dict[str, Any] = {}
    nodes: dict[str, dict[str, Any]] = {}
    for name, given in config.items():
        where, node = f"conditioner.{name}", dict(given)
        if accepts(node, "downsampling", where=where):
            node["downsampling"] = latent.downsampling
        modules[name], node = _with_tower(node, where)
        if node.get("weights", "") is None and not any(p.is_meta for p in modules[name].parameters()):  # no plan
            raise InputError(f"{where}.weights has no value; give the file of its weights as {where}.weights=FILE.")
        nodes[name] = getattr(modules[name], "node", node)
    return modules, nodes


def build_encoders(config: Mapping[str, Mapping[str, Any]], trained: bool = True) -> dict[str, PatchEncoder]:
    """One frozen encoder a name, `from_run` as of conditioners; trained: refuse one without its weights."""
    for name, node in config.items():
        if trained and node.get("weights", "") is None:
            raise InputError(
                f"encoder.{name}.weights has no value; give the file of {node['model']}'s weights, .safetensors or "
                f".pth, on the command line as encoder.{name}.weights=FILE."
            )
    return {name: _with_tower(node, f"encoder.{name}")[0] for name, node in config.items()}


def encoders_of(config: Config) -> Mapping[str, Mapping[str, Any]]:
    """The encoders that a denoiser is aligned with; InputError for an alignment without one, or one without that."""
    alignment, encoders = config.get("alignment"), config.get("encoder") or {}
    if bool(alignment) != bool(encoders):
        lone = "alignment has no encoder to align with; add encoder=dinov2 or encoder=clip."
        raise InputError(
            lone if alignment else f"encoder={', '.join(encoders)} is not used; add alignment=repa, irepa or urepa."
        )
    return encoders if alignment and alignment["weight"] else {}


class EncoderStates:
    """An encoder as a maker of states: features (B, D, h, w) of an image."""

    reads = frozenset({"image"})

    def __init__(self, encoder: Any) -> None:
        self._encoder, self.parameters = encoder, encoder.parameters

    def made_by(self) -> dict[str, Any]:
        """What determines the features."""
        return {"name": self._encoder.name, "width": self._encoder.width, "weights": self._encoder.weights_hash}

    def __call__(self, batch: Mapping[str, Any], encode: Encode) -> Tensor:
        return self._encoder(to_float(batch["image"].to(next(self.parameters()).device)))


def as_states(encoders: Mapping[str, Any]) -> dict[str, Any]:
    """Makers of states by the names under which latents carry them."""
    return {ENCODER_PREFIX + name: EncoderStates(encoder) for name, encoder in encoders.items()}


def _with_tower(given: Mapping[str, Any], where: str) -> tuple[Any, dict[str, Any]]:
    """A part and the node that it was built from; `from_run` is a CLIP run whose tower to use."""
    node = dict(given)
    run = node.pop("from_run", None)
    check_type(run, str | None, f"{where}.from_run")
    files = None if run is None else read_clip(run)
    if files is not None:
        node["config"] = files.spec["clip"]["config"]
    module = instantiate(node, where=where)
    if files is not None and not any(p.is_meta for p in module.tower.parameters()):  # of a plan
        module.tower.load_clip(files.parts["clip"])
    return module, node


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
    check_agreement(data.task, modules)


def class_bound(modules: Mapping[str, Any]) -> int | None:
    """Number of classes that every conditioner of class_id has a vector for; None where none reads it."""
    counts = [getattr(module, "classes", None) for module in modules.values() if "class_id" in module.reads]
    return min((count for count in counts if isinstance(count, int)), default=None)


def context_widths(modules: Mapping[str, Any], latent: LatentSpec) -> dict[str, int]:
    """Width of each slot: spatial channels add up, tokens and vectors must agree."""
    widths = {"tokens": 0, "spatial": 0, "vector": 0}
    for name, module in modules.items():
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


def with_classes_of(config: Config, data: ShardData) -> Config:
    """Where a task or a conditioner of boxes leaves `classes` open: those that the data's manifest names."""
    if not any(_open(node, "conditioner") for node in config["conditioner"].values()):
        return config
    manifest = data.manifest("train")
    names = manifest.classes
    if names is None or "boxes" not in manifest.fields or "class_id" in manifest.fields:  # the names of image classes
        return config
    nodes = {
        name: {**node, "classes": len(names), "names": names} if _open(node, f"conditioner.{name}") else node
        for name, node in config["conditioner"].items()
    }
    task = {**config["task"], "classes": len(names)} if _open(config["task"], "task") else config["task"]
    return {**config, "conditioner": nodes, "task": task}


def _open(node: Any, where: str) -> bool:
    return bool(node) and node.get("classes", 0) is None and accepts(node, "classes", where=where)


def check_agreement(task: Any, conditioners: Mapping[str, Any]) -> None:
    """Refuse, before the first step, a task whose output a conditioner cannot take."""
    for name, module in conditioners.items():
        if task is None or not module.reads & task.adds:
            continue
        most, places = getattr(task, "most", None), getattr(module, "objects", None)
        if most is not None and places is not None and most > places:
            raise InputError(
                f"task.most={most} boxes an image are more than conditioner.{name}.objects={places}; "
                "give both one value."
            )
        classes, known = getattr(task, "classes", None), getattr(module, "classes", None)
        if classes is not None and known is not None and classes > known:
            raise InputError(
                f"task.classes={classes}, but conditioner.{name}.classes={known} takes numbers below that; "
                "give both one value."
            )


def scored_task(task: Any, protocol: Protocol, image_size: int) -> Any:
    """The model's task with the protocol's size and options."""
    if not protocol.task and protocol.image_size is None:
        return task
    known = [item.name for item in fields(task)] if task is not None else []
    for name in sorted(protocol.task.keys() - set(known)):
        raise InputError(
            f"protocol.task.{name}: the model's task has no such option (it has {', '.join(known) or 'none'}); choose "
            "the protocol of its own task."
        )
    return task if task is None else replace(task, image_size=image_size, **protocol.task)


def states_record(modules: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's description of the states of these conditioners; None without any."""
    for name, module in modules.items():
        if _learns(module):
            raise InputError(
                f"conditioner.{name} is trained with the denoiser, so its states change; leave it out of "
                "encode, or freeze it (trainable=false)."
            )
        if not hasattr(module, "made_by"):
            raise InputError(
                f"conditioner={name} has no frozen encoder whose states could be stored; leave it out of encode."
            )
    return {name: _record(module) for name, module in modules.items()} or None


def states_encoder(modules: Mapping[str, Any], mirrored: bool) -> EncodeStates:
    """Runs the conditioners on a batch of images and their fields; image encoders get both views."""

    @torch.no_grad()
    def encode(images: Tensor, fields: Mapping[str, list[Any]]) -> dict[str, NDArray[np.float32]]:
        made = {}
        for name, module in modules.items():
            views = [images, images.flip(-1)] if mirrored and module.reads & {"reference", "image"} else [images]
            states = [module({**fields, "reference": view, "image": view}, _no_latents) for view in views]
            made[name] = torch.stack(states, dim=1).float().cpu().numpy()  # (B, views, L, D)
        return made

    return encode


def check_states(modules: Mapping[str, Any], data: ShardData) -> None:
    """Refuse states that differ from those of the run's own encoders."""
    for name in (one for one in data.stored if one in modules):
        if _learns(modules[name]):
            raise InputError(
                f"conditioner.{name} is trainable, but data.latents={data.latents} holds states of a frozen one; "
                "freeze it (trainable=false), or set data.states=false."
            )
        now = _record(modules[name]) if hasattr(modules[name], "made_by") else {}
        for split in ("train", "val"):
            there = stored_states(data.manifest(split, "latents")).get(name, {})
            if differing := sorted(key for key in there.keys() | now.keys() if there.get(key) != now.get(key)):
                key = differing[0]  # layer=last there, penultimate here
                raise InputError(
                    f"data.latents={data.latents} holds states of another {maker_of(name)} than this run's "
                    f"({key}={there.get(key)} there, {now.get(key)} here); encode again, or set data.states=false to "
                    "run the encoder."
                )


def _learns(module: Any) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _record(module: Any) -> dict[str, Any]:
    record = {"reads": sorted(module.reads), "dtype": DTYPE, **module.made_by()}
    return json.loads(json.dumps(record))  # tuples as lists, as they come back from the manifest


def _no_latents(pixels: Tensor) -> Tensor:
    raise AssertionError("a frozen encoder reads no latents")
