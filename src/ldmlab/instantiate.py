"""Configuration nodes to objects: `_target_` names a callable, the other keys are its arguments. No Hydra.

Typed options and a user's own yaml files are trusted: `trust_typed` records their targets, and then
any callable is allowed there, with Hydra's `_partial_` too. A description that arrives in a file (model.yaml, a run's
config.yaml) names only classes of the room that holds such parts (`ROOMS`), or classes of allowed plugin packages; it
gives them neither paths nor commands.
"""

import functools
import importlib
import inspect
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ldmlab import plugins
from ldmlab.argument_types import check_types
from ldmlab.errors import InputError, did_you_mean, shown
from ldmlab.part_checks import CONTRACTS, LARGEST, check_part, made, members

_GROUPS = {  # package of ldmlab => the groups whose classes it holds
    "first_stages": ("first_stage",),
    "backbones": ("backbone", "classifier"),
    "conditioners": ("conditioner",),
    "encoders": ("encoder",),
    "diffusion": (
        *("diffusion", "latent_scale", "schedule", "prediction"),
        *("time_sampling", "weighting", "diffusion_loss"),
    ),
    "samplers": ("sampler",),
    "tasks": ("task",),
    "losses": ("loss",),
    "data": ("data",),
    "metrics": ("metric", "features"),
    "training": ("optimizer", "lr_schedule", "trainer", "callback", "logger"),
    "evaluation": ("protocol", "evaluator", "baseline"),
}
ROOMS = {group: f"ldmlab.{package}" for package, groups in _GROUPS.items() for group in groups}
FACTORIES = {  # functions that descriptions of CLIP towers name => the arguments that a file may give them
    "ldmlab.nn.openclip.build_clip": {"config", "image_size"},
    "ldmlab.conditioners.text.open_clip_text": {
        *("config", "layer", "padding", "unused", "drop", "trainable", "cache_mib"),
    },
    "ldmlab.conditioners.image_embedding.open_clip_image": {"config", "layer", "drop"},
}
_SEVERAL = {  # part of an option's name => its group, where one more part names the entry
    **{"conditioner": "conditioner", "encoder": "encoder", "logger": "logger", "guidance": "guider"},
    **{f"{group}s": group for group in ("conditioner", "callback", "metric", "evaluator", "baseline", "guider")},
}
_REACHING_OUT = {  # arguments by which a class would read, write or run something
    *("trust", "command", "cmd", "args", "path", "file", "folder", "dir", "directory", "filename", "root", "url"),
    *("run", "from_run", "weights", "pretrained", "vocab", "checkpoint", "save_dir", "module", "code"),
}
_READ_AS_WORDS = {  # path of a vocabulary, or refused
    ("ldmlab.conditioners.text.TransformerText", "vocab"),
    ("ldmlab.conditioners.sd3_text.Sd3Text", "vocab"),
}
_OURS = "_target_", "_partial_"
_TYPED: set[tuple[str, str]] = set()  # (group, target) of this process's own configuration


def instantiate(node: Mapping[str, Any], *, where: str, trust: bool = False, **derived: Any) -> Any:
    """Call the node's target with its keys and the `derived` arguments, which win over nothing: a clash is an error.

    `where` is the option's full name in messages, such as conditioner.text. A mapping with a `_target_` among the keys
    is built first. Arguments are checked against the target's signature and annotations, and what is built against
    the contract of its group. `trust`: as if it were typed. Raises InputError.
    """
    target, partial = locate(node, where=where, trust=trust), node.get("_partial_", False)
    if not isinstance(partial, bool):
        raise InputError(f"{where}._partial_={shown(partial)} must be true or false.")
    if not (trust or _is_typed(node, where)):
        _check_reach(target, node, where)
    arguments = {
        str(key): instantiate(value, where=f"{where}.{key}", trust=trust) if _is_node(value) else value
        for key, value in node.items()
        if key not in _OURS
    }
    if doubled := arguments.keys() & derived.keys():
        names = ", ".join(sorted(doubled))
        raise InputError(f"{where}.{names} is derived from other options; remove it.")
    check_arguments(target, arguments, where, complete=False)
    for name in derived:
        if not takes(target, name):
            raise InputError(f"{where}._target_={shown(node['_target_'])} must take the argument {name}; add it.")
    check_arguments(target, arguments | derived, where, complete=not partial)
    check_types(target, arguments, where)
    arguments |= derived
    built = functools.partial(target, **arguments) if partial else made(target, arguments, where)
    group, whole = group_of(where)
    if whole and group in CONTRACTS:
        check_part(built, CONTRACTS[group], where, str(node["_target_"]))
    return built


def trust_typed(config: Any, where: str = "") -> None:
    """Record the targets of a configuration composed by the user: each is allowed in its group in this process."""
    if isinstance(config, Mapping):
        if isinstance(config.get("_target_"), str):
            _TYPED.add((group_of(where)[0], config["_target_"]))
        for key, value in config.items():
            trust_typed(value, f"{where}.{key}" if where else str(key))
    for part in config if isinstance(config, list) else ():
        trust_typed(part, where)


def group_of(where: str) -> tuple[str, bool]:
    """The group of an option such as callbacks.scores.protocol, and whether it names a whole part of the group."""
    group, whole = "", False
    names = iter(where.split("."))
    for name in names:
        if name in _SEVERAL:
            group, whole = _SEVERAL[name], True
            next(names, None)  # the entry's own name
        elif name in ROOMS or name in CONTRACTS or not group:
            group, whole = ("diffusion_loss" if group == "diffusion" and name == "loss" else name), True
        else:
            whole = False
    return group, whole


def locate(node: Mapping[str, Any], *, where: str, trust: bool = False) -> Callable[..., Any]:
    """The callable that the node's `_target_` names."""
    path = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(path, str) or "." not in path:
        given = f"._target_={shown(path)}" if isinstance(node, Mapping) else f"={shown(node)}"
        raise InputError(f"{where}{given} names nothing to build; {_way_out(where)}")
    if unknown := [key for key in node if str(key).startswith("_") and key not in _OURS]:
        raise InputError(f"{where}.{unknown[0]} is not supported; the only special keys are _target_ and _partial_.")
    trusted = trust or _is_typed(node, where)
    package, (module, _, name) = path.partition(".")[0], path.rpartition(".")
    if not trusted:
        _check_package(path, package, where)  # before anything is imported
    target = _imported(path, module, name, where)
    if not callable(target):
        raise InputError(f"{where}._target_={shown(path)} is no class or function; {_way_out(where)}")
    if not trusted:
        _check_kind(target, path, where)
    try:
        inspect.signature(target)
    except ValueError:  # of some classes in C
        raise InputError(f"{where}._target_={shown(path)} names no options; wrap it in a class of your own.") from None
    if package != "ldmlab":
        plugins.used(package)
    return target


def _way_out(where: str) -> str:
    return f"give {where}._target_=PACKAGE.CLASS." if "." in where else f"choose a file of conf/{where}/."


def _is_typed(node: Mapping[str, Any], where: str) -> bool:
    return (group_of(where)[0], node.get("_target_")) in _TYPED


def _check_package(path: str, package: str, where: str) -> None:
    """A part of ours in the right room, or a package that the caller allowed."""
    if package == "ldmlab":
        room = ROOMS.get(group_of(where)[0])
        if path not in FACTORIES and (room is None or not path.startswith(f"{room}.")):
            raise InputError(f"{where}._target_={shown(path)} is no part of this kind, so a file may not name it.")
    elif not plugins.is_allowed(package):
        raise InputError(
            f"{where}._target_={shown(path)} is outside ldmlab and could run any code; {plugins.how_to_allow(package)}"
        )


def _check_kind(target: Any, path: str, where: str) -> None:
    """A class that belongs to the package it is named in and has the methods of its contract; no function."""
    if path in FACTORIES:
        return
    group, whole = group_of(where)
    home = ROOMS.get(group, "ldmlab") if path.startswith("ldmlab.") else path.partition(".")[0]
    if not inspect.isclass(target) or not f"{target.__module__}.".startswith(f"{home}."):
        raise InputError(f"{where}._target_={shown(path)} is no class of {home}, so a file may not name it.")
    methods, _ = members(CONTRACTS[group]) if whole and group in CONTRACTS else ((), ())
    if missing := [method for method in methods if not hasattr(target, method)]:
        raise InputError(f"{where}._target_={shown(path)} has no {missing[0]}(), so it is no {group}.")


def _check_reach(target: Callable[..., Any], node: Mapping[str, Any], where: str) -> None:
    """Arguments from a file may be numbers, texts and other parts: no path, no command, no extreme value."""
    path = str(node["_target_"])
    annotated = {name: str(p.annotation) for name, p in inspect.signature(target).parameters.items()}
    for name, value in node.items():
        option = f"{where}.{name}"
        allowed = name in FACTORIES[path] if path in FACTORIES else name not in _REACHING_OUT
        allowed = allowed or (path, name) in _READ_AS_WORDS
        if value is not None and name not in _OURS and (not allowed or "Path" in annotated.get(name, "")):
            raise InputError(
                f"{option}={shown(value)} would reach outside the model; a file may not give it: leave it out."
            )
        if where == "data" and isinstance(value, str) and (value.startswith("pipe:") or "::" in value):
            raise InputError(f"{option}={shown(value)} could run any command; a file may not give it: type it instead.")
        if any(isinstance(n, int) and abs(n) > LARGEST for n in _scalars(value)):
            raise InputError(f"{option}={shown(value)} is beyond any network's size; the file is damaged.")


def _scalars(value: Any) -> Iterator[Any]:
    if not isinstance(value, list | tuple | Mapping):
        yield value
        return
    for part in value.values() if isinstance(value, Mapping) else value:
        yield from _scalars(part)


def accepts(node: Mapping[str, Any], name: str, *, where: str) -> bool:
    """Whether the node's target takes an argument of this name."""
    return name in inspect.signature(locate(node, where=where)).parameters


def takes(target: Callable[..., Any], name: str) -> bool:
    """Whether the target takes an argument of this name, be it among others."""
    parameters = inspect.signature(target).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def instantiate_with(node: Mapping[str, Any], *, where: str, **offered: Any) -> Any:
    """`instantiate` with those of the `offered` arguments that the target takes."""
    taken = {name: value for name, value in offered.items() if accepts(node, name, where=where)}
    return instantiate(node, where=where, **taken)


def _imported(path: str, module: str, name: str, where: str) -> Any:
    """The object, imported; InputError where there is none, or where a user's own module cannot be imported."""
    package = path.partition(".")[0]
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:
        absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
        if absent or (isinstance(error, AttributeError) and isinstance(error.obj, types.ModuleType)):
            outside = f"is {package} installed, and the name right?"
            hint = _way_out(where) if package == "ldmlab" else outside
            raise InputError(f"{where}._target_={shown(path)} does not exist; {hint}") from error
        if package == "ldmlab":
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {shown(' '.join(str(error).split()))}; {place.filename}, line {place.lineno}"
        raise InputError(
            f"{where}._target_={shown(path)} cannot be imported ({reason}); mend the module, or install what it needs."
        ) from error


def completed(value: Any, *, where: str) -> Any:
    """Nodes with the options they leave out at their defaults, at any depth inside `value`."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    defaults = {}
    if _is_node(value):
        parameters = inspect.signature(locate(value, where=where)).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {name: completed(part, where=f"{where}.{name}") for name, part in {**defaults, **value}.items()}


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def check_arguments(
    target: Callable[..., Any], arguments: Mapping[str, Any], where: str, *, complete: bool = True
) -> None:
    """Refuse names that the target does not take, and with `complete` those that are missing."""
    parameters = inspect.signature(target).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    for name in arguments:
        if name not in known and not open_ended:
            hint = did_you_mean(name, known, f"there are {', '.join(known) or 'none'}.")
            raise InputError(f"{where}.{name}: there is no such option; {hint}")
    required = [name for name, p in known.items() if p.default is p.empty and name not in arguments]
    if required and complete and required[0] in ("params", "optimizer"):
        raise InputError(f"{where}.{required[0]} is known in training only; set {where}._partial_=true.")
    if required and complete:
        raise InputError(
            f"{where}.{required[0]} has no value; give it on the command line as {where}.{required[0]}=VALUE."
        )
