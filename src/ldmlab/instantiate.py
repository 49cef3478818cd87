"""Configuration nodes to objects: `_target_` names a callable, the other keys are its arguments. No Hydra."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ldmlab.errors import InputError


def instantiate(node: Mapping[str, Any], *, where: str, trust: bool = False, **derived: Any) -> Any:
    """Call the node's target with its keys and the `derived` arguments, which win over nothing: a clash is an error.

    `where` names the configuration group in messages. A mapping with a `_target_` among the keys is built first.
    Targets outside ldmlab are refused unless `trust`. Raises InputError for unknown, missing or doubled arguments.
    """
    target = locate(node, where=where, trust=trust)
    given = {
        str(key): instantiate(value, where=f"{where}.{key}", trust=trust) if _is_node(value) else value
        for key, value in node.items()
        if key != "_target_"
    }
    if doubled := given.keys() & derived.keys():
        names = ", ".join(sorted(doubled))
        raise InputError(f"{where}.{names} is worked out from other options; leave it out.")
    arguments = given | derived
    _check_arguments(target, arguments, where)
    return target(**arguments)


def locate(node: Mapping[str, Any], *, where: str, trust: bool = False) -> Callable[..., Any]:
    """The callable that the node's `_target_` names."""
    path = node.get("_target_")
    if not isinstance(path, str) or "." not in path:
        raise InputError(f"{where}._target_={path!r} names nothing to build; choose a file of conf/{where}/.")
    if not trust and path.split(".")[0] != "ldmlab":
        raise InputError(f"{where}._target_={path} is outside ldmlab and could run any code; load it with trust=True.")
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name != module:
            raise  # the module exists but lacks one of its own dependencies
        raise InputError(f"{where}._target_={path} does not exist; choose a file of conf/{where}/.") from error


def accepts(node: Mapping[str, Any], name: str, *, where: str) -> bool:
    """Whether the node's target takes an argument of this name."""
    return name in inspect.signature(locate(node, where=where)).parameters


def completed(value: Any, *, where: str) -> Any:
    """Nodes with the options they leave out at their defaults, however deep inside `value`: old beside new ones."""
    if not isinstance(value, Mapping):
        return list(value) if isinstance(value, tuple) else value
    defaults = {}
    if _is_node(value):
        parameters = inspect.signature(locate(value, where=where)).parameters
        defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    return {name: completed(part, where=f"{where}.{name}") for name, part in {**defaults, **value}.items()}


def _is_node(value: Any) -> bool:
    return isinstance(value, Mapping) and "_target_" in value


def _check_arguments(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    for name in arguments:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(parameters)}."
            raise InputError(f"{where}.{name}: there is no such option; {hint}")
    required = [name for name, p in parameters.items() if p.default is p.empty and name not in arguments]
    if required:
        raise InputError(
            f"{where}.{required[0]} has no value; give it on the command line as {where}.{required[0]}=VALUE."
        )
