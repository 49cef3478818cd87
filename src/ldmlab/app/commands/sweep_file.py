"""`ldmlab sweep-file`: the file that `wandb sweep` reads, from the arguments of a Hydra multirun.

The agent's arguments are Hydra overrides, `key=value` without hyphens.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ldmlab.app.cli import at_least
from ldmlab.app.compose import compose, parse_override, plain
from ldmlab.argument_types import check_type
from ldmlab.errors import InputError
from ldmlab.files import write_text
from ldmlab.report.score_curves import read_curves

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


GOALS = ("minimize", "maximize")
_LOGGED: dict[str, tuple[str, ...]] = {  # stage => columns of metrics.csv, the one of the best checkpoint first
    "diffusion": ("val/loss", "loss", "gradient_norm/denoiser"),
    "classifier": ("val/accuracy", "val/loss", "accuracy", "loss", "gradient_norm/classifier"),
    "clip": (
        *("val/recall_5_of_50", "val/recall_1_of_50", "val/recall_5_of_all", "val/recall_1_of_all", "loss"),
        *("val/image_to_text_recall_1_of_50", "val/image_to_text_recall_5_of_50", "val/text_to_image_recall_1_of_50"),
        *("val/text_to_image_recall_5_of_50", "val/similarity_matched", "gradient_norm/clip"),
    ),
    "autoencoder": ("val/psnr", "val/ssim", "val/latent_std", "l1", "reconstruction", "gradient_norm/generator"),
}
_MORE_IS_BETTER = re.compile(r"psnr|ssim|accuracy|recall|matched|images_per_second|/(is|precision|density|coverage)$")


def goal_of(metric: str) -> str:
    """Whether less or more of a metric is better."""
    return GOALS[bool(_MORE_IS_BETTER.search(metric))]


def checked_metric(config: Any, metric: str | None, option: str) -> str:
    """The metric of a composed run, by default the one of its best checkpoint; InputError where it is not logged."""
    stage = config.stage.name
    logged = list(_LOGGED[stage])
    if stage == "autoencoder" and config.loss.get("lpips_weight"):
        logged.insert(0, "val/lpips")
    scores: Mapping[str, Any] = (config.callbacks or {}).get("scores") or {}
    logged += [f"in_training/{name}" for name in (scores.get("protocol") or {}).get("metrics") or {}]
    if metric is None:
        return f"in_training/{scores['monitor']}" if scores.get("monitor") else logged[0]
    if metric not in logged:
        raise InputError(f"{option}{metric}: stage={stage} logs no such metric; choose among {', '.join(logged)}.")
    return metric


def whole_number(option: str, value: Any, least: int) -> None:
    """InputError for what is no whole number of at least so much."""
    check_type(value, int, option)
    if value < least:
        raise InputError(f"{option}={value} must be at least {least}.")


def check_search(search: Any) -> None:
    """Refuse numbers and a name with which a search would break after its first trials."""
    for name, least in {"n_trials": 1, "n_jobs": 1, "max_failures": 0, "seed": 0}.items():
        whole_number(f"hydra.sweeper.search.{name}", search[name], least)
    if not re.fullmatch(r"[A-Za-z0-9._-]+", str(search.study)):
        raise InputError(
            f"hydra.sweeper.search.study={search.study} becomes folder names; use letters, digits, dots, dashes."
        )


def check_options(config: Any) -> None:
    """Refuse what a composed run would refuse of the types of its options, before a search keeps them."""
    from omegaconf import OmegaConf

    from ldmlab.argument_types import check_types
    from ldmlab.instantiate import check_arguments, locate

    content = plain(OmegaConf.masked_copy(config, [name for name in config if name != "hydra"]))
    for name in ("trainer", "optimizer", "lr_schedule", "backbone", "diffusion"):
        if isinstance(node := content.get(name), dict) and "_target_" in node:
            given = {k: v for k, v in node.items() if not k.startswith("_") and not isinstance(v, dict)}
            check_arguments(target := locate(node, where=name), given, name, complete=False)
            check_types(target, given, name)


def swept_values(item: Any) -> Any:
    """The values of an override: a list with numbers as numbers and else Hydra's text, or its IntervalSweep."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    given = item.value()
    if item.input_line.startswith(("+", "~")):
        raise InputError(f"{item.input_line}: a swept option cannot begin with + or ~; it is passed as key=value.")
    if isinstance(given, Glob):
        raise InputError(f"{item.input_line}: a search takes lists and intervals; write the names out.")
    if isinstance(given, IntervalSweep):
        return given
    texts = item.sweep_string_iterator()
    values = [(text, parse_override(f"{item.key_or_group}={text}").value()) for text in texts]
    return [value if type(value) in (int, float) else text for text, value in values]


def distribution(item: Any) -> Any:
    """Optuna's distribution of `interval(a,b)`, with `tag(log,...)` and `int(...)`, of `range(a,b,c)` and of a list."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values = swept_values(item)
    if item.is_interval_sweep():
        if not values.start < values.end or not values.tags <= {"log"} or ("log" in values.tags and values.start <= 0):
            raise InputError(f"{item.input_line}: give interval(LOW,HIGH), or tag(log,interval(LOW,HIGH)) above 0.")
        kind = IntDistribution if isinstance(values.start, int) else FloatDistribution
        return kind(values.start, values.end, log="log" in values.tags)
    if item.is_range_sweep() and len(values) > 1:
        kind = IntDistribution if isinstance(values[0], int) else FloatDistribution
        return kind(min(values), max(values), step=abs(values[1] - values[0]))
    return CategoricalDistribution(values)


def best_value(run: Path, metric: str, goal: str) -> float | None:
    """The best value of a metric over a run's validations, which is that of its best checkpoint; None: never logged."""
    try:
        values = [value for _, value in read_curves(run / "metrics.csv").get(metric, []) if value == value]
    except InputError:  # a trial leaves no table behind
        return None
    return (min if goal == GOALS[0] else max)(values, default=None)
