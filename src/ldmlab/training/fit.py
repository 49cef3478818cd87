"""Train a stage in a run folder: from the start, or from the newest checkpoint found there."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmlab import distributed
from ldmlab.checkpoints import load_checkpoint, load_exactly
from ldmlab.errors import InputError
from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.checkpointing import Checkpoints
from ldmlab.training.engine import make_trainer, rates_line, summary
from ldmlab.training.loggers import Logger, Loggers
from ldmlab.training.loop import Loop
from ldmlab.training.progress import StepProgress
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.signals import StopRequest
from ldmlab.training.stage import Batch, Stage


def fit(
    stage: Stage,
    *,
    train_batches: Callable[[int], Iterable[Batch]],  # position to start from => endless micro-batches
    val_batches: Callable[[], Iterable[Batch]],  # this process's share, from the start at every call
    run: RunFolder,
    settings: TrainerSettings,
    callbacks: Sequence[StepCallback] = (),
    loggers: Sequence[Logger] = (),
    resume_command: str = "",  # what a stopped run tells people to type
    manifest_hash: str | None = None,  # of the training data; a resumed run must have the same
    config: Mapping[str, Any] | None = None,  # resolved settings for the loggers
) -> Path:
    """Train to `stage.max_steps`; the path of the last checkpoint. A signal saves and ends in SystemExit(128 + n)."""
    distributed.join()
    first = distributed.rank() == 0
    checkpoints = Checkpoints(run.checkpoints, settings.keep)
    found = _take_up(stage, checkpoints, manifest_hash)
    if found is not None and stage.step >= stage.max_steps:
        return found[0]
    session = Session(stage, run, Loggers(loggers, first), val_batches, **_from_notes(found))
    with StopRequest() as stop, StepProgress(first) as progress:
        states = found[1]["rng"] if found else []
        loop = Loop(session, settings, callbacks, checkpoints, progress, stop, states, manifest_hash)
        _introduce(stage, settings, progress, found)
        _arrange(stage, settings)
        success = False
        try:
            session.loggers.open(run, dict(config or {}), stage.step)
            _train(stage, settings, loop, train_batches, stop)
            success = stop.signal is None
        finally:
            session.loggers.close(success)
    if stop.signal is not None:
        _leave(loop, stop, run, resume_command)
    path = distributed.from_first(loop.last_checkpoint)
    assert path is not None
    return path


def _take_up(stage: Stage, checkpoints: Checkpoints, manifest_hash: str | None) -> tuple[Path, dict[str, Any]] | None:
    """Load the newest checkpoint into the stage; all processes take the same file."""
    if distributed.rank() == 0:
        checkpoints.sweep()
    mine: list[tuple[Path, dict[str, Any]]] = []  # the first process reads while it looks; the others are told where

    def look() -> Path | None:
        mine.extend([found] if (found := checkpoints.newest()) else [])
        return mine[0][0] if mine else None

    path = distributed.shared(look)
    if path is None:
        return None
    content = mine[0][1] if mine else load_checkpoint(path)
    before = content["data"]["manifest_hash"]
    if manifest_hash is not None and before is not None and before != manifest_hash:
        raise InputError(f"{path} was trained on other data (its manifest differs); start a new run with init_from.")
    if content["seed"] != stage.seed:
        raise InputError(f"seed={stage.seed} but {path} was made with seed={content['seed']}; resume with that seed.")
    stage.restore(content)
    return path, content


def _from_notes(found: tuple[Path, dict[str, Any]] | None) -> dict[str, Any]:
    return {"notes": found[1]["notes"]} if found else {}


def _introduce(
    stage: Stage, settings: TrainerSettings, progress: StepProgress, found: tuple[Path, dict[str, Any]] | None
) -> None:
    progress.say(summary(stage, settings))
    progress.say(rates_line(stage))
    if found is not None:
        progress.say(f"going on from step {stage.step} in {found[0]}")


def _arrange(stage: Stage, settings: TrainerSettings) -> None:
    """Compilation; it changes no name and no value in a checkpoint."""
    if settings.compile:
        next(iter(stage.saved().values())).compile()  # in place: names get no prefix


class _Endless:
    """An iterable and nothing else, so that Lightning neither counts nor rebuilds the loader."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._batches)


def _train(
    stage: Stage,
    settings: TrainerSettings,
    loop: Loop,
    train_batches: Callable[[int], Iterable[Batch]],
    stop: StopRequest,
) -> None:
    trainer = make_trainer(stage, settings, loop)
    stage.train()
    try:
        trainer.fit(stage, _Endless(train_batches(stage.position)))
    except Exception as error:
        # the signal may have reached the loader's workers too; the state is still that of the last whole step
        if (
            stop.signal is None
            or stage.updating
            or distributed.joined()
            or isinstance(error, FloatingPointError | InputError)
        ):
            raise
        loop.save()


def _leave(loop: Loop, stop: StopRequest, run: RunFolder, resume_command: str) -> None:
    """Say where it stopped and how to go on."""
    if distributed.rank() == 0:
        how = f"; go on with: {resume_command}" if resume_command else ""
        print(f"saved step {loop.session.stage.step} in {loop.last_checkpoint}{how}", file=sys.stderr, flush=True)
    distributed.barrier()
    run.close()
    raise SystemExit(stop.exit_code)


def load_initial_weights(
    stage: Stage, state_dicts: Mapping[str, Mapping[str, Tensor]], source: str = "init_from"
) -> None:
    """Start from another run's weights: the main network must be among them, and names must match exactly."""
    modules = stage.saved()
    main = next(iter(modules))
    if main not in state_dicts:
        held = ", ".join(state_dicts) or "nothing"
        raise InputError(f"{source} holds {held} but no {main}; give a run, checkpoint or model folder of this stage.")
    for name, tensors in state_dicts.items():
        if name in modules:
            load_exactly(modules[name], tensors, f"{source} ({name})")
