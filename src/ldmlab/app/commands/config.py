"""`ldmlab config`: the final value of every option and the file that set it."""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ldmlab.app.compose import compose, composing
from ldmlab.app.conf_files import conf_dir, find_file, groups, leaves
from ldmlab.errors import InputError

CONFIGURATIONS = ("train", "evaluate", "encode")
COMMAND_LINE = "the command line"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("configuration", choices=CONFIGURATIONS, help="the program")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as on the command line of that program")
    parser.add_argument("--only", default="", metavar="KEY", help="options that begin so, such as trainer")


def run(args: argparse.Namespace) -> None:
    """One line an option: key, value, file."""
    found = [o for o in origins(args.configuration, args.overrides) if o.key.startswith(args.only)]
    if not found:
        raise InputError(f"--only={args.only}: no option begins so; leave --only out to see all.")
    texts = [f"{o.key} = {o.value}" for o in found]
    width = min(max(map(len, texts)), 70)
    for text, origin in zip(texts, found, strict=True):
        print(f"{text:<{width}}  # {origin.file}")


class Origin(NamedTuple):
    key: str  # trainer.max_steps
    value: Any  # resolved; ??? where it must still be given
    file: str  # conf/trainer/default.yaml, or the command line


def origins(config_name: str, overrides: Sequence[str]) -> list[Origin]:
    """Every option of `conf/<config_name>.yaml` with `overrides`, in the order of the configuration."""
    from omegaconf import OmegaConf

    config = compose(config_name, overrides)
    last_writer = dict(_written(config_name, overrides))
    found = []
    for key, value in leaves(OmegaConf.to_container(config, resolve=True, throw_on_missing=False)):
        written = key  # by itself, or with the nearest mapping around it that was set as a whole
        while written not in last_writer and "." in written:
            written = written.rpartition(".")[0]
        found.append(Origin(key, value, last_writer.get(written, "")))
    return found


def _written(config_name: str, overrides: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, file) in the order in which Hydra merges the files; what comes later wins."""
    import yaml
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    with composing(config_name, overrides) as words:
        loader = GlobalHydra.instance().config_loader()
        merged = loader.compute_defaults_list(config_name, words, RunMode.RUN).defaults
        files = [(find_file(entry.config_path or ""), entry.package or "") for entry in merged]
    for file, package in files:
        if file is not None:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            content.pop("defaults", None)
            name = f"conf/{file.relative_to(conf_dir())}" if file.is_relative_to(conf_dir()) else str(file)
            for key, _ in leaves(content, "" if package == "_global_" else package):
                yield key, name
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key.partition("@")[0].partition("/")[0] not in groups() or "." in key:
            yield key, COMMAND_LINE
