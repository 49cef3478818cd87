"""`ldmlab sweep-file`: the file that `wandb sweep` reads, from the arguments of a Hydra multirun.

The agent's arguments are Hydra overrides, `key=value` without hyphens.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError

METHODS = ("grid", "random", "bayes")
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ldmlab sweep-file`."""
    parser.add_argument(
        "overrides",
        nargs="+",
        metavar="KEY=VALUE",
        help="as after `python train.py -m`: experiment=NAME seed=0,1,2\n"
        "optimizer.learning_rate=interval(1e-5,1e-3) or tag(log,interval(1e-5,1e-3))",
    )
    parser.add_argument("--out", type=Path, default=Path("sweep.yaml"), help="the file (default: sweep.yaml)")
    parser.add_argument("--name", help="of the sweep, and group of its runs (default: the file's)")
    parser.add_argument("--method", choices=METHODS, default="grid", help="default: grid, every combination")
    parser.add_argument("--metric", help="a column of metrics.csv (default: the one that chooses the best checkpoint)")
    parser.add_argument("--goal", choices=GOALS, help="default: as the metric is better")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of each run, by torchrun (default: 1)")
    parser.add_argument("--runs", type=int, help="random and bayes: how many")


def run(args: argparse.Namespace) -> int:
    """Write the file and print the next command."""
    import yaml

    name = args.name or args.out.stem
    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise InputError(f"--name {name!r} becomes a group's name; use letters, digits, dots, dashes.")
    for option, value in (("--processes", args.processes), ("--runs", args.runs)):
        if value is not None and value < 1:
            raise InputError(f"{option} {value} must be at least 1.")
    options = SweepOptions(name, args.method, args.metric, args.goal, args.processes, args.runs)
    content = sweep_file(args.overrides, options)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(yaml.safe_dump(content, sort_keys=False, width=1000), encoding="utf-8")
    print(f"{args.out}: start it with `wandb sweep --project ldmlab {args.out}`, then run the agent it names")
    return 0


@dataclass(frozen=True)
class SweepOptions:
    """Options of a W&B sweep besides its parameters."""

    name: str
    method: str = "grid"  # grid | random | bayes
    metric: str | None = None  # of metrics.csv; None: the one that chooses the best checkpoint
    goal: str | None = None  # minimize | maximize; None: as the metric is better
    processes: int = 1  # of torchrun, for each run
    runs: int | None = None  # where random and bayes stop


def sweep_file(overrides: Sequence[str], options: SweepOptions) -> dict[str, Any]:
    """The content of the file: swept options as parameters, fixed options in the command."""
    parsed = _parse(overrides)
    swept = {item.key_or_group: _values(item, options.method) for item in parsed if item.is_sweep_override()}
    if not swept:
        raise InputError("nothing is swept: give an option several values, such as seed=0,1,2.")
    fixed = [item.input_line for item in parsed if not item.is_sweep_override()]
    given = {item.key_or_group for item in parsed}
    fixed += [line for line in _always(options.name) if line.split("=")[0] not in given]
    metric = options.metric
    for config in _check(fixed, swept):
        metric = _checked_metric(config, metric)
    goal = options.goal or GOALS[bool(_MORE_IS_BETTER.search(str(metric)))]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"] if options.processes > 1 else []
    return {
        "name": options.name,
        "program": "train.py",
        "method": options.method,
        "metric": {"name": metric, "goal": goal},
        **({"run_cap": options.runs} if options.runs is not None else {}),
        "command": ["${env}", "${interpreter}", *launcher, "${program}", *fixed, "${args_no_hyphens}"],
        "parameters": swept,
    }


def _always(name: str) -> list[str]:
    """Runs of a W&B sweep are online, and its name is their group."""
    return ["logger=wandb", "logger.wandb.mode=online", f"run.group={name}"]


def _parse(overrides: Sequence[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except OverrideParseException as error:
        raise InputError(f"{error.override}: not an override; write key=value or key=value1,value2.") from error
    names = [item.key_or_group for item in parsed]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is given twice; give it once, with all its values.")
    return parsed


def _values(item: Any, method: str) -> dict[str, Any]:
    """One parameter of the file: a list of values, or an interval."""
    from hydra.core.override_parser.types import Glob, IntervalSweep

    given = item.value()
    if item.input_line.startswith(("+", "~")):
        raise InputError(f"{item.input_line}: a swept option cannot begin with + or ~; W&B passes it as key=value.")
    if isinstance(given, Glob):
        raise InputError(f"{item.input_line}: W&B supports lists and intervals; write the names out.")
    if not isinstance(given, IntervalSweep):
        return {"values": [_plain(text, item.key_or_group) for text in item.sweep_string_iterator()]}
    if method == "grid":
        raise InputError(f"{item.input_line}: method=grid needs listed values; list some, or use --method random.")
    kind = "log_uniform_values" if "log" in given.tags else "uniform"
    return {"distribution": kind, "min": given.start, "max": given.end}


def _plain(text: str, key: str) -> Any:
    """A number where it is one, so that W&B can plot it; else Hydra's own text, which the agent passes on unchanged."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = OverridesParser.create().parse_override(f"{key}={text}").value()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def _checked_metric(config: Any, metric: str | None) -> str:
    """The metric of a composed run; InputError where its stage does not log it."""
    stage = config.stage.name
    logged = list(_LOGGED[stage])
    if stage == "autoencoder" and config.loss.get("lpips_weight"):
        logged.insert(0, "val/lpips")
    scores: Mapping[str, Any] = (config.callbacks or {}).get("scores") or {}
    logged += [f"in_training/{name}" for name in (scores.get("protocol") or {}).get("metrics") or {}]
    if metric is None:
        return f"in_training/{scores['monitor']}" if scores.get("monitor") else logged[0]
    if metric not in logged:
        raise InputError(f"--metric {metric}: stage={stage} logs no such metric; choose among {', '.join(logged)}.")
    return metric


def _check(fixed: Sequence[str], swept: dict[str, dict[str, Any]]) -> list[Any]:
    """Compose every value with the first ones of the others, so that typos are found now; the configurations."""
    from ldmlab.app.compose import compose

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
