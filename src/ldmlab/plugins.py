"""Packages from outside whose classes a file may name; the caller allows them, never the file.

Three ways: `plugins=[mylab]` or `--plugins mylab`, the environment variable LDMLAB_PLUGINS=mylab,other, and an
installed distribution that declares the entry point group `ldmlab.plugins`.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from ldmlab.errors import InputError, shown

ENTRY_POINTS = "ldmlab.plugins"
VARIABLE = "LDMLAB_PLUGINS"
_ALLOWED: set[str] = set()  # by the command at hand
_USED: set[str] = set()  # packages of which something was built in this process


def allow(names: Any, option: str = "plugins") -> None:
    """Allow the packages of a list, or of text with commas; each must be importable."""
    for name in _listed(names, option):
        if not name.isidentifier():
            raise InputError(
                f"{option}={name} is no package's name; write the name that Python imports, such as mylab."
            )
        if name in sys.stdlib_module_names:
            raise InputError(f"{option}={name} is a module of Python itself, no package of parts; leave it out.")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise InputError(f"{option}={name} cannot be imported: it needs {error.name}; install that.") from error
            raise _not_installed(name, option) from error
        _ALLOWED.add(name)


def check_variable() -> None:
    """InputError for a package of LDMLAB_PLUGINS that is not installed; none is imported."""
    for name in _listed(os.environ.get(VARIABLE, ""), VARIABLE):
        if name not in sys.modules and not (name.isidentifier() and importlib.util.find_spec(name)):
            raise _not_installed(name, VARIABLE)


def _not_installed(name: str, option: str) -> InputError:
    return InputError(
        f"{option}={name} is not installed; run `pip install {name.replace('_', '-')}`, or put its folder on "
        "PYTHONPATH."
    )


def _listed(names: Any, option: str) -> list[str]:
    if isinstance(names, str):
        return [name.strip() for name in names.split(",") if name.strip()]
    if names is None:
        return []
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{option}={shown(names)} must list packages; write {option}=[mylab].")
    return list(names)


def is_allowed(package: str) -> bool:
    """Whether classes of this top-level package may be named by files."""
    by_variable = _listed(os.environ.get(VARIABLE, ""), VARIABLE)
    return package in _ALLOWED or package in by_variable or package in by_entry_point()


@cache
def by_entry_point() -> frozenset[str]:
    points = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return frozenset(point.module.partition(".")[0] for point in points)


def how_to_allow(package: str) -> str:
    """The end of a sentence that refuses a package."""
    if package in sys.stdlib_module_names:
        return "no file may name it."
    found = False
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec(package) is not None
    allowing = f"plugins=[{package}] (--plugins {package} after `ldmlab sample` and the like, or {VARIABLE}={package})"
    if found:
        return f"if you trust that package, allow it with {allowing}."
    return f"that package is not installed: `pip install {package.replace('_', '-')}`, then allow it with {allowing}."


def used(package: str) -> None:
    """Remember that a part of the package was built."""
    _USED.add(package)


def versions(packages: Iterable[str] | None = None) -> dict[str, str]:
    """Version by package, of those used in this process unless some are given."""
    return {package: _version(package) for package in sorted(_USED if packages is None else packages)}


@cache  # the table of all distributions takes a second or more
def _version(package: str) -> str:
    for distribution in importlib.metadata.packages_distributions().get(package, [package]):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return str(getattr(importlib.import_module(package), "__version__", "unknown"))


def named_in(value: Any) -> set[str]:
    """Packages other than ldmlab that the `_target_`s inside a description name."""
    if not isinstance(value, list | tuple | Mapping):
        return set()
    own: set[str] = set()
    if isinstance(value, Mapping):
        target, value = value.get("_target_"), value.values()
        own = {target.partition(".")[0]} - {"ldmlab"} if isinstance(target, str) else own
    return own.union(*map(named_in, value))
