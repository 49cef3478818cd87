"""The origin of each option's final value: a file or the command line."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ldmlab.app.compose import compose, composing, conf_dir, find_file, groups

COMMAND_LINE = "the command line"


class Origin(NamedTuple):
    """One option of a composed configuration."""

    key: str  # trainer.max_steps
    value: Any  # resolved; ??? where it must still be given
    file: str  # conf/trainer/default.yaml, or the command line


def origins(config_name: str, overrides: Sequence[str]) -> list[Origin]:
    """Every option of `conf/<config_name>.yaml` with `overrides`, in the order of the configuration."""
    from omegaconf import OmegaConf

    config = compose(config_name, overrides)
    last_writer = dict(_written(config_name, overrides))
    values = dict(_leaves(OmegaConf.to_container(config, resolve=True, throw_on_missing=False)))
    return [Origin(key, value, _of(key, last_writer)) for key, value in values.items()]


def _written(config_name: str, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, file) in the order in which Hydra merges the files; what comes later wins."""
    for file, package in _merge_order(config_name, overrides):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        content.pop("defaults", None)
        name = f"conf/{file.relative_to(conf_dir())}" if file.is_relative_to(conf_dir()) else str(file)
        for key, _ in _leaves(content, "" if package == "_global_" else package):
            yield key, name
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key.partition("@")[0].partition("/")[0] not in groups() or "." in key:
            yield key, COMMAND_LINE


def _merge_order(config_name: str, overrides: Sequence[str]) -> list[tuple[Path, str]]:
    """(file, package) of every file of the composition."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with composing(config_name, overrides) as words:
        loader = GlobalHydra.instance().config_loader()
        found = loader.compute_defaults_list(config_name, words, RunMode.RUN).defaults
        files = [(find_file(d.config_path or ""), d.package or "") for d in found]
    return [(file, package) for file, package in files if file is not None]


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping; an empty mapping counts as a value."""
    if isinstance(node, Mapping) and node:
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, node


def _of(key: str, last_writer: Mapping[str, str]) -> str:
    """The writer of the key, or of the nearest mapping around it that was set as a whole."""
    while key not in last_writer and "." in key:
        key = key.rpartition(".")[0]
    return last_writer.get(key, "")
