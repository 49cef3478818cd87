"""Scores as they are printed: name, number, direction, meaning and marks, the same on pages and in tables."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ldmlab.report.page_content import ARROW, DASH
from ldmlab.report.paper_source import PAPER_FEATURES

FEW_IMAGES = 1000  # below, k-NN balls are too wide for precision and recall to separate images from noise
_SHARES = frozenset({"precision", "recall", "coverage", "copies"})
_BY_BALLS = {  # scores by k-NN balls, and the file of conf/metric behind them
    **dict.fromkeys(("precision", "recall"), "precision_recall"),
    **dict.fromkeys(("density", "coverage"), "density_coverage"),
}
_SAME_VALUE = frozenset({"_target_", "small_sample", "spread_groups", "spread", "screening"})


@dataclass(frozen=True)
class ScoreLine:
    name: str
    title: str
    value: str
    direction: str  # lower | higher | info
    meaning: str
    note: str = ""

    @property
    def head(self) -> str:
        """The title with its arrow."""
        return f"{self.title} {ARROW[self.direction]}".strip()


@cache
def _known() -> dict[str, list[str]]:
    """Of our own scores; the record of a score may have its own."""
    return yaml.safe_load(Path(__file__).with_name("scores.yaml").read_text(encoding="utf-8"))


def described(name: str, score: Mapping[str, Any] | None = None) -> tuple[str, str, str]:
    """Title, direction (lower | higher | info) and meaning of a score."""
    title, direction, meaning = _known().get(name, (name, "info", ""))
    own = score or {}
    if isinstance(better := own.get("higher_is_better"), bool):
        direction = "higher" if better else "lower"
    return str(own.get("title") or title), direction, str(own.get("meaning") or meaning)


def called(title: str, result: Mapping[str, Any]) -> str:
    """FID, rFID and KID are distances of Inception's features alone; other networks have names of their own."""
    return by_features(title, str(result["features"]["name"]), "steps" not in result["sampling"])


def by_features(title: str, features: str, reconstructions: bool = False) -> str:
    """A distance's title by the network whose features are compared."""
    if features == PAPER_FEATURES:
        name = "rFID" if reconstructions else "FID"
        return title.replace("Fréchet distance", name).replace("Kernel distance", "KID")
    if "dinov2" in features:
        return title.replace("Fréchet distance", "FD-DINOv2")
    return title.replace("Fréchet distance", "FD-CLIP") if features.startswith("open_clip") else title


def score_line(name: str, score: Mapping[str, Any], result: Mapping[str, Any]) -> ScoreLine:
    """A score of a record; precision and related scores are marked if they use few images."""
    title, direction, meaning = described(name, score)
    marks = list(score.get("marks") or ())
    count = min(result["sampling"]["images"], result["reference"]["images"])
    if name in _BY_BALLS and count < FEW_IMAGES and not any("images" in mark for mark in marks):
        marks.append(f"of {count:,} images: below {FEW_IMAGES:,}, noise reaches high values too")
    text = score_text(name, score["value"], score.get("spread"))
    return ScoreLine(name, called(title, result), text, direction, meaning, "; ".join(marks))


def score_text(name: str, value: float, spread: float | None = None) -> str:
    """Shares in percent, the rest in significant digits."""
    if name not in _SHARES:
        return number_text(value, spread)
    return share_text(value) if spread is None else f"{share_text(value)} ± {share_text(spread)}"


def share_text(value: float | None) -> str:
    """0.25 as 25.0%."""
    return "none" if value is None else f"{value:.1%}"


def number_text(value: float, spread: float | None = None) -> str:
    """Four significant digits, three below 1; trailing zeros are kept, so that the values of a column are aligned."""
    if not math.isfinite(value):
        text = str(value)
    elif abs(value) >= 1000:
        text = f"{value:.0f}"
    else:
        text = f"{value:#.{4 if abs(value) >= 1 else 3}g}"
    if spread is None:
        return text
    return f"{text} ± " + f"{spread:#.2g}".rstrip(".")


def features_text(features: Mapping[str, Any]) -> str:
    """The network whose features are compared; of a CLIP trained here its size, and how well it finds captions."""
    more, quality = [], features.get("quality") or {}
    if own := features.get("own_parameters"):
        more.append(f"a CLIP of {own / 1e6:.1f} M parameters trained here, no published network")
    if "recall_1_of_50" in quality:
        chance = f", by chance {quality['chance_recall_1_of_50']:.0%}" if "chance_recall_1_of_50" in quality else ""
        more.append(f"finds the caption among 50 for {quality['recall_1_of_50']:.0%} of validation images{chance}")
    return " ".join([str(features["name"]), *([f"({'; '.join(more)})"] if more else [])])


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """What all scores suffer from: few images, a feature network of one's own."""
    found, made, real = [], result["sampling"]["images"], result["reference"]["images"]
    if min(made, real) < FEW_IMAGES:
        found.append(f"few images: {made:,} against {real:,} real ones; small differences between models are chance")
    if result["features"].get("own_parameters"):
        found.append("features of a small CLIP trained here: compare only numbers by this very network")
    return found


def control_text(name: str, result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Title of each control and its value of a score."""
    found = (result.get("controls") or {}).values()
    return [
        (str(one["title"]), score_text(name, float(one["scores"][name]["value"])) if name in one["scores"] else DASH)
        for one in found
    ]


def options_of(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide a score's value, such as the neighbours of precision."""
    node = (result["protocol"].get("metrics") or {}).get(_BY_BALLS.get(name, name)) or {}
    return {option: value for option, value in node.items() if option not in _SAME_VALUE}
