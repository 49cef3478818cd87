"""What a sweep varies and what it compares its runs by: for `ldmlab sweep-file` and the sweepers of train.py."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.app.compose import parse_override
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


def best_value(run: Path, metric: str, goal: str) -> float | None:
    """The best value of a metric over a run's validations, which is that of its best checkpoint; None: never logged."""
    try:
        values = [value for _, value in read_curves(run / "metrics.csv").get(metric, []) if value == value]
    except InputError:  # a trial leaves no table behind
        return None
    return (min if goal == GOALS[0] else max)(values, default=None)
