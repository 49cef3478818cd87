"""Where a result comes from: the run behind the model, and what was changed in the protocol's file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml


def run_record(folder: Path) -> dict[str, Any]:
    """Seed and group of the run behind a model, and a hash of all else that it was asked for; empty without a run."""
    path = folder / "config.yaml"
    if not path.exists():
        return {}
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    run, apart = config.get("run") or {}, ("seed", "run", "paths", "logger")
    asked = json.dumps({name: node for name, node in config.items() if name not in apart}, sort_keys=True, default=str)
    return {
        "training_seed": config.get("seed"),
        "group": run.get("group") or run.get("name"),
        "configuration": hashlib.sha256(asked.encode()).hexdigest()[:12],
    }


def changed(node: Mapping[str, Any]) -> list[str]:
    """Options of a protocol that are not those of the file it is named after."""
    from ldmlab.app.compose import compose, group_choices, plain

    if node["name"] not in group_choices("protocol"):
        return []
    file = dict(_flat(plain(compose("evaluate", [f"protocol={node['name']}", "model=none"]).protocol)))
    ours = dict(_flat(node))
    return [
        f"{name}={ours.get(name, 'none')} (file: {file.get(name, 'none')})"
        for name in dict.fromkeys([*ours, *file])
        if ours.get(name) != file.get(name)
    ]


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their full names."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif name != "_target_":
            yield f"{prefix}{name}", value
