"""Hydra's composition, with its errors turned into one sentence that names the nearest valid choice."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError

_PACKAGED = Path(__file__).parents[1] / "conf"
_CHECKOUT = Path(__file__).parents[3] / "conf"


def conf_dir() -> Path:
    """The configuration that belongs to this code: inside an installed package, or at the root of a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def group_choices(group: str) -> list[str]:
    """The names that `group=` accepts, folders inside the group included."""
    folder = conf_dir() / group
    return sorted(str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.yaml"))


def groups() -> list[str]:
    """The configuration groups, one folder each."""
    return sorted(p.name for p in conf_dir().iterdir() if p.is_dir() and p.name != "hydra")


def compose(config_name: str, overrides: list[str]) -> Any:
    """The configuration `conf/<config_name>.yaml` with `key=value` overrides, as a DictConfig."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    try:
        with _aside(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra_compose(config_name, overrides)
    except Exception as error:
        raise explained(error, config_name, overrides) from error


@contextmanager
def _aside() -> Iterator[None]:
    """Hydra's own command line, where it is running, steps aside: beside it a second composition is refused."""
    from hydra.core.global_hydra import GlobalHydra

    running = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = running


def hydra_main(config_name: str, job: Callable[[Any], None]) -> None:
    """Run `job` under Hydra's own command line: overrides, `--multirun`, `--cfg job --resolve`."""
    import hydra

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra shortens tracebacks to its own frames otherwise
    failed: list[Exception] = []

    def guarded(config: Any) -> None:
        try:
            job(config)
        except Exception as error:  # kept for later: Hydra would print a line of its own, and end the whole sweep
            failed.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(guarded)()
    except Exception as error:
        raise explained(error, config_name, sys.argv[1:]) from error
    if failed:
        raise failed[0]


def explained(error: Exception, config_name: str, overrides: list[str]) -> Exception:
    """An InputError for what the user can mend, any other exception as it is."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InputError) or not isinstance(error, HydraException | OmegaConfBaseException):
        return error
    text = str(error)
    if match := re.search(r"Could not find '([^']+)'", text):
        return _missing_choice(match[1])
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1], config_name)
    if match := re.search(r"Key '([^']+)' is not in struct\s+full_key: (\S+)", text):
        return _unknown_key(match[2], config_name)
    if match := re.search(r"Could not append to config.*?'?([\w./]+)'? is already", text, re.DOTALL):
        return InputError(f"+{match[1]}: the option exists already; leave out the + to change it.")
    if match := re.search(r"Missing mandatory value: (\S+)", text):
        return InputError(f"{match[1]} has no value; give it on the command line as {match[1]}=VALUE.")
    return InputError(f"the command line {' '.join(overrides)!r} cannot be used: {' '.join(text.split())}")


def _missing_choice(path: str) -> InputError:
    group, _, name = path.rpartition("/")
    while group and not (conf_dir() / group).is_dir():
        group, _, head = group.rpartition("/")
        name = f"{head}/{name}"
    if not group:
        return InputError(f"{path}: there is no such option or group{_nearest(path, groups())}")
    choices = group_choices(group)
    return InputError(f"{group}={name}: there is no such file in conf/{group}/{_nearest(name, choices)}")


def _unknown_key(key: str, config_name: str) -> InputError:
    known = _flat_keys(compose(config_name, [])) + groups()
    return InputError(f"{key}: there is no such option{_nearest(key, known)} `--cfg job` prints them all.")


def _flat_keys(node: Any, prefix: str = "") -> list[str]:
    from omegaconf import DictConfig

    keys: list[str] = []
    for name in node:
        keys.append(f"{prefix}{name}")
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_missing() and not child._is_none():
            keys += _flat_keys(child, f"{prefix}{name}.")
    return keys


def _nearest(name: str, choices: list[str]) -> str:
    """The end of a sentence: `; did you mean x?`, or the whole list when nothing is near and it is short."""
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if not near:  # a right last part under a wrong parent
        near = [c for c in choices if c.rpartition(".")[2] == name.rpartition(".")[2]][:1]
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(choices)}." if choices and len(choices) <= 30 else "."


def plain(config: Any) -> dict[str, Any]:
    """The whole configuration as dicts, lists and numbers; a value that is still missing is an InputError.

    A person composed it, so what it names is trusted, and the packages of `plugins` are allowed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    from ldmlab.instantiate import trust_typed
    from ldmlab.plugins import allow

    try:
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise explained(error, "", []) from error
    assert isinstance(content, dict)
    allow(content.get("plugins"))
    trust_typed(content)
    return {str(key): value for key, value in content.items()}
