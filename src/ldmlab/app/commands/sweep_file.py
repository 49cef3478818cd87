"""`ldmlab sweep-file`: the file that `wandb sweep` reads, from the arguments of a Hydra multirun.

The agent's arguments are Hydra overrides, `key=value` without hyphens.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ldmlab.app.cli import at_least
from ldmlab.app.compose import compose, parse_override
from ldmlab.app.sweep_metric import GOALS, checked_metric, goal_of, swept_values
from ldmlab.errors import InputError
from ldmlab.files import write_text

METHODS = ("grid", "random", "bayes")
_OVERRIDES = """as after `python train.py -m`: experiment=NAME seed=0,1,2
optimizer.learning_rate=interval(1e-5,1e-3) or tag(log,interval(1e-5,1e-3))"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("overrides", nargs="+", metavar="KEY=VALUE", help=_OVERRIDES)
    add("--out", type=Path, default=Path("sweep.yaml"), help="the file (default: sweep.yaml)")
    add("--name", help="of the sweep, and group of its runs (default: the file's)")
    add("--method", choices=METHODS, default="grid", help="default: grid, every combination")
    add("--metric", help="a column of metrics.csv (default: the one that chooses the best checkpoint)")
    add("--goal", choices=GOALS, help="default: as the metric is better")
    add("--processes", type=int, default=1, help="GPUs of each run, by torchrun (default: 1)")
    add("--runs", type=int, help="random and bayes: how many")


def run(args: argparse.Namespace) -> None:
    args.name = args.name or args.out.stem
    if not re.fullmatch(r"[A-Za-z0-9._-]+", args.name):
        raise InputError(f"--name {args.name!r} becomes a group's name; use letters, digits, dots, dashes.")
    at_least(args, processes=1, runs=1)
    content = sweep_file(args)
    write_text(args.out, yaml.safe_dump(content, sort_keys=False, width=1000))
    print(f"{args.out}: start it with `wandb sweep --project ldmlab {args.out}`, then run the agent it names")


def sweep_file(args: argparse.Namespace) -> dict[str, Any]:
    parsed = [parse_override(word) for word in args.overrides]
    given = [item.key_or_group for item in parsed]
    if twice := [name for name in given if given.count(name) > 1]:
        raise InputError(f"{twice[0]} is given twice; give it once, with all its values.")
    swept = {item.key_or_group: _parameter(item, args.method) for item in parsed if item.is_sweep_override()}
    if not swept:
        raise InputError("nothing is swept: give an option several values, such as seed=0,1,2.")
    fixed = [item.input_line for item in parsed if not item.is_sweep_override()]
    always = ["logger=wandb", f"run.group={args.name}"]  # the sweep's name is their group
    fixed += [line for line in always if line.split("=")[0] not in given]
    metric = args.metric
    for config in _check(fixed, swept):
        if "mode" not in ((config.logger or {}).get("wandb") or {}):
            raise InputError("logger: a W&B sweep reads its metric from what logger=wandb sends; give that, or none.")
        metric = checked_metric(config, metric, "--metric ")
    fixed += [] if "logger.wandb.mode" in given else ["logger.wandb.mode=online"]
    processes = ["-m", "torch.distributed.run", f"--nproc-per-node={args.processes}"] if args.processes > 1 else []
    return {
        "name": args.name,
        "program": "train.py",
        "method": args.method,
        "metric": {"name": metric, "goal": args.goal or goal_of(str(metric))},
        **({"run_cap": args.runs} if args.runs is not None else {}),
        "command": ["${env}", "${interpreter}", *processes, "${program}", *fixed, "${args_no_hyphens}"],
        "parameters": swept,
    }


def _parameter(item: Any, method: str) -> dict[str, Any]:
    """One parameter of the file: a list of values, or an interval."""
    values = swept_values(item)
    if isinstance(values, list):
        return {"values": values}
    if method == "grid":
        raise InputError(f"{item.input_line}: method=grid needs listed values; list some, or use --method random.")
    kind = "log_uniform_values" if "log" in values.tags else "uniform"
    more: dict[str, int] = {}
    if isinstance(values.start, int):  # of int(...)
        kind, more = ("q_" + kind, {"q": 1}) if "log" in values.tags else ("int_uniform", {})
    return {"distribution": kind, "min": values.start, "max": values.end, **more}


def _check(fixed: Sequence[str], swept: dict[str, dict[str, Any]]) -> list[Any]:
    """Compose every value with the first ones of the others, so that typos are found now; the configurations."""
    choices = {key: node.get("values") or [node["min"], node["max"]] for key, node in swept.items()}
    first = {key: values[0] for key, values in choices.items()}
    composed = []
    for key, values in choices.items():
        for value in values:
            config = compose("train", [*fixed, *(f"{k}={v}" for k, v in {**first, key: value}.items())])
            if config.stage.name == "all":  # an agent gives one W&B id to what are several runs
                raise InputError("stage=all is several runs a job, W&B steers one; use `python train.py -m` instead.")
            composed.append(config)
    return composed
