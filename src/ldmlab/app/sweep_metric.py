"""What a sweep varies and what it compares its runs by: for `ldmlab sweep-file` and the sweepers of train.py."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.app.compose import parse_override, plain
from ldmlab.argument_types import check_type
from ldmlab.errors import InputError
from ldmlab.report.score_curves import read_curves

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
