"""Samplers by name: one file each, with a class of the file's name; `_stepwise.py` holds what they share."""

import importlib
import inspect
import pkgutil
from typing import Any

from ldmlab.contracts import Sampler
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate


def sampler_names() -> list[str]:
    """The files of this folder, without those that begin with an underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def sampler_by_name(name: str, **options: Any) -> Sampler:
    """Build samplers/NAME.py's class, or a plugin's class by its full name; an option that it lacks is refused."""
    if "." in name:
        return instantiate({"_target_": name, **options}, where="sampler")
    if name not in sampler_names():
        raise InputError(f"sampler={name} is unknown; choose one of {', '.join(sampler_names())}.")
    target = getattr(importlib.import_module(f"{__name__}.{name}"), name.title().replace("_", ""))
    for option in options.keys() - inspect.signature(target).parameters.keys():
        raise InputError(f"{option}={options[option]}: the sampler {name} has no such setting; leave it out.")
    return target(**options)
