"""A Hydra multirun as a W&B sweep file: the agent's arguments are Hydra overrides, `key=value` without hyphens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldmlab.errors import InputError


@dataclass(frozen=True)
class SweepOptions:
    """What a W&B sweep knows beside its parameters."""

    name: str
    method: str = "grid"  # grid | random | bayes
    metric: str = "val/loss"  # of metrics.csv
    goal: str = "minimize"  # minimize | maximize
    processes: int = 1  # of torchrun, for each run
    runs: int | None = None  # where random and bayes stop


def sweep_file(overrides: Sequence[str], options: SweepOptions) -> dict[str, Any]:
    """The content of the file: what is swept as parameters, what is fixed in the command."""
    parsed = _parse(overrides)
    swept = {item.key_or_group: _values(item, options.method) for item in parsed if item.is_sweep_override()}
    if not swept:
        raise InputError("nothing is swept: give an option several values, such as seed=0,1,2.")
    fixed = [item.input_line for item in parsed if not item.is_sweep_override()]
    given = {item.key_or_group for item in parsed}
    fixed += [line for line in _always(options.name) if line.split("=")[0] not in given]
    _check(fixed, swept)
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={options.processes}"] if options.processes > 1 else []
    return {
        "name": options.name,
        "program": "train.py",
        "method": options.method,
        "metric": {"name": options.metric, "goal": options.goal},
        **({"run_cap": options.runs} if options.runs is not None else {}),
        "command": ["${env}", "${interpreter}", *launcher, "${program}", *fixed, "${args_no_hyphens}"],
        "parameters": swept,
    }


def _always(name: str) -> list[str]:
    """A sweep lives at W&B: its runs are online, and its name is their group."""
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
        raise InputError(f"{item.input_line}: W&B knows lists and intervals; write the names out.")
    if not isinstance(given, IntervalSweep):
        return {"values": [_plain(text, item.key_or_group) for text in item.sweep_string_iterator()]}
    if method == "grid":
        raise InputError(f"{item.input_line}: method=grid needs listed values; list some, or use --method random.")
    kind = "log_uniform_values" if "log" in given.tags else "uniform"
    return {"distribution": kind, "min": given.start, "max": given.end}


def _plain(text: str, key: str) -> Any:
    """A number where it is one, so that W&B can plot it; else Hydra's own text, which the agent passes on as it is."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    value = OverridesParser.create().parse_override(f"{key}={text}").value()
    return value if isinstance(value, int | float) and not isinstance(value, bool) else text


def _check(fixed: Sequence[str], swept: dict[str, dict[str, Any]]) -> None:
    """Every value must compose with the others' first, so that no agent meets a typo."""
    from ldmlab.app.compose import compose

    choices = {key: node.get("values") or [node["min"], node["max"]] for key, node in swept.items()}
    first = {key: values[0] for key, values in choices.items()}
    for key, values in choices.items():
        for value in values:
            config = compose("train", [*fixed, *(f"{k}={v}" for k, v in {**first, key: value}.items())])
            if config.stage.name == "all":  # an agent gives one W&B id to what are several runs
                raise InputError("stage=all is several runs a job, W&B steers one; use `python train.py -m` instead.")
