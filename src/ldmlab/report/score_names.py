"""What a score is called beside its network, and how its number is printed: the same on pages and in tables."""

import math
from collections.abc import Mapping
from typing import Any

from ldmlab.report.paper_conditions import PAPER_FEATURES

_SHARES = frozenset({"precision", "recall", "coverage", "held_out_real", "samples", "seen", "copies"})
_METRIC = {  # file of conf/metric behind a score, where it is called otherwise
    "precision": "precision_recall",
    "recall": "precision_recall",
    "density": "density_coverage",
    "coverage": "density_coverage",
}
_SAME_VALUE = frozenset({"_target_", "small_sample", "spread_groups", "spread", "screening"})


def called(name: str, usual: str, result: Mapping[str, Any]) -> str:
    """FID, rFID and KID are distances of Inception's features alone; other networks have names of their own."""
    features = str(result["features"]["name"])
    if features == PAPER_FEATURES:
        rebuilt = "steps" not in result["sampling"]
        return usual.replace("Fréchet distance", "rFID" if rebuilt else "FID").replace("Kernel distance", "KID")
    if "dinov2" in features:
        return usual.replace("Fréchet distance", "FD-DINOv2")
    return usual.replace("Fréchet distance", "FD-CLIP") if features.startswith("open_clip") else usual


def score_text(name: str, value: float, spread: float | None = None) -> str:
    """Shares in percent, the rest in significant digits."""
    if name not in _SHARES:
        return number_text(value, spread)
    return f"{value:.1%}" if spread is None else f"{value:.1%} ± {spread:.1%}"


def number_text(value: float, spread: float | None = None) -> str:
    """Four significant digits, three below 1; zeros at the end stay, so that numbers of a column line up."""
    if not math.isfinite(value):
        text = str(value)
    elif abs(value) >= 1000:
        text = f"{value:.0f}"
    else:
        text = f"{value:#.{4 if abs(value) >= 1 else 3}g}"
    if spread is None:
        return text
    return f"{text} ± " + f"{spread:#.2g}".rstrip(".")


def options_of(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide a score's value, such as the neighbours of precision."""
    node = (result["protocol"].get("metrics") or {}).get(_METRIC.get(name, name)) or {}
    return {option: value for option, value in node.items() if option not in _SAME_VALUE}
