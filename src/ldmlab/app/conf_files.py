"""Where configuration lies: ours, a user's own folders for the running command, and what they hold."""

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_PACKAGED = Path(__file__).parents[1] / "conf"
_CHECKOUT = Path(__file__).parents[3] / "conf"
OWN: list[str] = []  # a user's search path entries of the running command: file://FOLDER or pkg://PACKAGE


def conf_dir() -> Path:
    """The configuration that belongs to this code: inside an installed package, or at the root of a checkout."""
    return _PACKAGED if _PACKAGED.is_dir() else _CHECKOUT


def conf_dirs() -> list[Path]:
    """Ours, then the user's own of `--config-dir` and `hydra.searchpath`."""
    return [conf_dir(), *(folder for entry in OWN if (folder := folder_of(entry)) is not None)]


def find_file(path: str) -> Path | None:
    """The first folder's file of this name, without its ending: backbone/unet_small."""
    return next((file for folder in conf_dirs() if (file := folder / f"{path}.yaml").is_file()), None)


def group_choices(group: str) -> list[str]:
    """The names that `group=` accepts, with folders inside the group; `_NAME.yaml` are base files."""
    files = [(p, folder / group) for folder in conf_dirs() for p in (folder / group).rglob("*.yaml")]
    return sorted({str(p.relative_to(folder).with_suffix("")) for p, folder in files if p.name[0] != "_"})


def groups() -> list[str]:
    folders = [p for conf in conf_dirs() for p in conf.iterdir() if p.is_dir()]
    return sorted({p.name for p in folders if p.name != "hydra" and any(p.rglob("*.yaml"))})


def folder_of(entry: str) -> Path | None:
    """Where an entry of the search path lies; None for a package that cannot be found."""
    kind, _, place = entry.partition("://")
    if kind == "file":
        return Path(place)
    try:
        spec = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        return None
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything that is no mapping; an empty mapping counts as a value."""
    if isinstance(node, Mapping) and node:
        for key, child in node.items():
            yield from leaves(child, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, node
