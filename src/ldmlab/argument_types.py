"""Arguments from yaml and from the command line against the annotations of what they are given to."""

import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal, Union

from ldmlab.errors import InputError, shown

_PLAIN = bool | int | float | str | list | tuple | dict
_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}


def check_types(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> None:
    """InputError for an argument of another type than annotated; whole numbers are numbers, lists are tuples."""
    try:
        annotations = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names that exist for type checkers only
        return
    for name in (name for name in annotations if name in arguments):
        check_type(arguments[name], annotations[name], f"{where}.{name}" if where else name)


def check_type(value: Any, annotation: Any, option: str) -> None:
    if not _fits(value, annotation):
        raise InputError(f"{option}={shown(value)} {_fault(value, annotation, option)}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin is typing.Annotated:
        return _fits(value, inner[0])
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if annotation is None or annotation is type(None):
        return value is None
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if annotation in (bool, int, str):
        return isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool))
    return _object_fits(value, origin or annotation, inner) if isinstance(origin or annotation, type) else True


def _object_fits(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    if issubclass(kind, Path):
        return isinstance(value, str | Path)
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping) and (len(inner) != 2 or all(_fits(v, inner[1]) for v in value.values()))
    if issubclass(kind, Sequence | Set) or kind is typing.Iterable:
        if not isinstance(value, list | tuple | set | frozenset):
            return not isinstance(value, _PLAIN) and value is not None
        if kind is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return not inner or all(_fits(part, inner[0]) for part in value)
    if kind is object or not isinstance(value, _PLAIN | None):
        return True
    return not getattr(kind, "_is_protocol", False) and isinstance(value, kind)  # no contract is met by plain values


def _fault(value: Any, annotation: Any, option: str) -> str:
    """The end of the sentence: what was expected, and how to write it."""
    expected = _expected(annotation)
    if isinstance(value, float) and not math.isfinite(value):
        return f"is not finite; give {expected}."
    if isinstance(value, str) and "number" in expected and _reads_as_number(value):
        return f"is text; give {expected}, without quotes: {option}={value.strip()}."
    if isinstance(value, float) and value.is_integer() and "whole number" in expected:
        return f"is no whole number as it is written; give {option}={int(value)}."
    if not isinstance(value, str) and expected in ("text", "text or null"):
        return f"is not text; quote it twice, once for your shell: '{option}=\"{shown(value)}\"'."
    return f"does not fit; give {expected}."


def _reads_as_number(text: str) -> bool:
    try:
        return isinstance(float(text), float)
    except ValueError:
        return False


def _expected(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_expected(choice) for choice in inner))
    if origin is Literal:
        return " or ".join(shown(choice) for choice in inner)
    if annotation in _NAMES:
        return _NAMES[annotation]
    kind = origin or annotation
    if not isinstance(kind, type) or not issubclass(kind, Path | Mapping | Sequence | Set):
        return "a part with a _target_"
    if issubclass(kind, Path):
        return "a path"
    if kind is tuple and inner and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}: [{', '.join(_expected(part) for part in inner)}]"
    if issubclass(kind, Mapping):
        return f"a mapping of {_SEVERAL.get(inner[1], 'values')}" if len(inner) == 2 else "a mapping"
    return f"a list of {_SEVERAL.get(inner[0], 'values')}" if inner else "a list"


def declared(part: Callable[..., Any]) -> list[tuple[str, str]]:
    """Each option with a condition: `option option: condition, option: condition`, the `idle_without` of its class.

    A condition is `other`, which is set, `other=value` or `other!=value`, several with `or`; one on what the class has
    no argument for holds.
    """
    entries = [entry.split(": ") for entry in getattr(part, "idle_without", "").split(", ") if entry]
    return [(option, condition) for options, condition in entries for option in options.split()]


def idle(part: Callable[..., Any], options: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, bool]]:
    """Options without effect: the name after `where`, the sentence, whether nobody switched off what it needs."""
    defaults = {name: one.default for name, one in inspect.signature(part).parameters.items()}
    values = defaults | dict(options)
    for option, condition in declared(part):
        name, ways = f"{where}.{option}", condition.split(" or ")
        if option not in options or any(_holds(values, way) for way in ways):
            continue
        needed = [way.partition("=")[0].rstrip("!") for way in ways]
        others = list(dict.fromkeys(f"{where}.{one}" for one in needed))
        value = f"with {others[0]}={_text(values.get(needed[0]))}"
        way = value if "=" in condition else f"without {' or '.join(others)}"
        text = f"{name}={_text(options[option])} has no effect {way}; set that too, or leave {name} out."
        same = {one: _text(values.get(one)) == _text(defaults.get(one)) for one in (option, *needed)}
        yield name, text, not same.pop(option) and all(same.values())


def _holds(values: Mapping[str, Any], condition: str) -> bool:
    name, equals, value = condition.partition("=")
    found = values.get(name.rstrip("!"), value or True)
    return (_text(found) == value) != name.endswith("!") if equals else bool(found)


def _text(value: Any) -> str:
    return shown(list(value) if isinstance(value, tuple) else value)


def named_value(word: str) -> tuple[str, Any]:
    """`form=linear` => its name and value: a number, true, false or a word."""
    name, equals, text = word.partition("=")
    if not (name and equals and text):
        raise InputError(f"sampler=NAME:{word} has no option; write for instance sde:form=linear.")
    for kind in (int, float):
        try:
            return name, kind(text)
        except ValueError:
            continue
    return name, {"true": True, "false": False}.get(text, text)
