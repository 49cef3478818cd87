"""The last lines that a run prints: its folder, its last validation, and the next command."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldmlab.errors import InputError
from ldmlab.report.score_curves import read_curves
from ldmlab.training.stage import Stage
from ldmlab.training.validation import validation_line


def finished(run: Path, config: Mapping[str, Any], *, nested: bool) -> str:
    """Of a run that reached its last step; the next command unless it is part of another one."""
    try:
        curves = read_curves(run / "metrics.csv")
    except InputError:  # the table is damaged or gone; the checkpoints are there
        curves = {}
    points = {name.removeprefix("val/"): curve[-1] for name, curve in curves.items() if name.startswith("val/")}
    last = max((int(step) for step, _ in points.values()), default=0)
    line = validation_line({name: value for name, (step, value) in points.items() if step == last}, last)
    place = shlex.quote(str(run))
    data = shlex.join(f"data.{split}={config['data'].get(split)}" for split in ("train", "val"))
    following = {
        "autoencoder": f"ldmlab encode data=shards {data} from_run={place} out={place}-latents",
        "clip": f"ldmlab train conditioner=text conditioner.text.from_run={place} data.latents=LATENTS",
        "classifier": f"ldmlab sample MODEL 0 --classifier {place}",
        "diffusion": f"ldmlab evaluate model={place}",
    }
    return f"finished: {run}{line}" + ("" if nested else f"\nnext: {following[config['stage']['name']]}")


def ended_early(run: Path, stage: Stage, max_steps: int, command: str) -> str:
    """Of a run that a callback or a limit of the Trainer ended, with the command that resumes it."""
    return (
        f"ended at step {stage.step} of trainer.max_steps={max_steps} by a callback or limit of the trainer: {run}"
        f"{validation_line(stage.validated, stage.validated_at)}\nto go on: {command}"
    )
