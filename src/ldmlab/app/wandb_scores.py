"""Scores of evaluate.py in the W&B run of the model they belong to."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ldmlab.app.comparison import comparison_fields
from ldmlab.app.run_records import scores_of
from ldmlab.errors import InputError
from ldmlab.instantiate import instantiate
from ldmlab.model_files import read_description
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.wandb_logger import WandB


def send_scores(run_folder: Path, out: Path | None = None) -> None:
    """All evaluations of the run, and one elsewhere, to its W&B run if it has one; never an error: files hold them.

    Names are evaluation/FOLDER/SCORE, where FOLDER is that of the evaluation: its protocol unless chosen otherwise.
    """
    try:
        _send(run_folder, out)
    except Exception as error:  # no network, no account, no wandb: the score is not lost for that
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        _say(f"W&B did not take the scores ({reason}); they are in {out or run_folder}, and go with the next ones.")


def _send(run_folder: Path, out: Path | None) -> None:
    logger, settings = _logger_of(run_folder)
    if logger is None:
        return
    values = scores_of(run_folder)
    if out is not None and not out.resolve().is_relative_to((run_folder / "evaluation").resolve()):
        found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))["scores"]
        values |= {f"{out.name}/{name}": score["value"] for name, score in found.items()}
    run = RunFolder(run_folder, json.loads((run_folder / "provenance.json").read_text())["run_id"])
    try:
        run.lock()
    except InputError:  # two processes in one W&B run would overwrite each other
        _say(f"{run_folder} is still training; its W&B run gets these scores with those of the next evaluation.")
        return
    try:
        logger.send_scores(run, settings, {f"evaluation/{name}": value for name, value in values.items()})
    finally:
        run.close()


def _logger_of(run_folder: Path) -> tuple[WandB | None, dict[str, Any]]:
    """The W&B logger that the run was trained with, if any, and the settings that it was told."""
    if not (run_folder / "config.yaml").exists() or not (run_folder / "provenance.json").exists():
        return None, {}
    config: Mapping[str, Any] = yaml.safe_load((run_folder / "config.yaml").read_text(encoding="utf-8"))
    target = f"{WandB.__module__}.{WandB.__qualname__}"
    for name, node in (config.get("logger") or {}).items():
        if node and node.get("_target_") == target and node.get("mode") != "disabled":
            logger = instantiate(node, where=f"logger.{name}")
            return logger, {**config, **comparison_fields(read_description(run_folder))}
    return None, {}


def _say(text: str) -> None:
    print(text, file=sys.stderr)
