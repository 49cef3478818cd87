"""Train a stage in a run folder: from the start, or from the newest checkpoint found there."""

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.checkpoints import load_checkpoint, load_exactly
from ldmlab.errors import InputError
from ldmlab.training.callbacks.base import SKIPPED, Session, StepCallback
from ldmlab.training.checkpointing import Checkpoints, complete
from ldmlab.training.engine import make_trainer, rates_line, summary
from ldmlab.training.lightning_parts import LightningCallbacks
from ldmlab.training.loggers import Logger, Loggers, lost_rows
from ldmlab.training.loop import Loop
from ldmlab.training.progress import StepProgress
from ldmlab.training.resume import Record, compare
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
    resume_command: str = "",  # printed by a stopped run: how to resume it
    manifest_hash: str | None = None,  # of the training data; a resumed run must have the same
    record: Record | None = None,  # configuration and model, which a resumed run is compared by
    fields: Mapping[str, Any] | None = None,  # more settings for the loggers
    begin: Callable[[], None] = lambda: None,  # writes what else a run folder holds from its first step on
) -> Path:
    """Train to `stage.max_steps`; the path of the last checkpoint. A signal saves and ends in SystemExit(128 + n).

    Nothing is written before the newest checkpoint was read and compared, nor in a run that is finished.
    """
    distributed.join()
    record = record or Record()
    first = distributed.rank() == 0
    checkpoints = Checkpoints(run.checkpoints, settings.keep)
    found, changes = _take_up(stage, checkpoints, settings, manifest_hash, record)
    finished = stage.step >= stage.max_steps
    if found is not None and (lost := lost_rows(run.metrics, stage.step, 1 if finished else settings.log_every)):
        distributed.say(lost)
    if found is not None and finished:
        return found[0]
    run.begin()
    if first:
        checkpoints.sweep()
    begin()
    session = Session(stage, run, Loggers(loggers, first), val_batches, **_from_notes(found))
    with StopRequest() as stop, StepProgress(first) as progress:
        states = found[1]["rng"] if found else []
        loop = Loop(session, settings, callbacks, checkpoints, progress, stop, states, manifest_hash, record)
        _introduce(stage, settings, progress, found, changes)
        _arrange(stage, settings)
        success = False
        try:
            session.loggers.open(run, {**record.config, **(fields or {})}, stage.step)
            _train(stage, settings, loop, train_batches, stop)
            success = stop.signal is None
        finally:
            session.loggers.close(success)
    if stop.signal is not None:
        _leave(loop, stop, run, resume_command)
    for line in unread(session):
        distributed.say(line)
    path = distributed.from_first(loop.last_checkpoint)
    assert path is not None
    return path


Found = tuple[Path, dict[str, Any]] | None  # the newest checkpoint and its content


def _take_up(
    stage: Stage, checkpoints: Checkpoints, settings: TrainerSettings, manifest_hash: str | None, record: Record
) -> tuple[Found, list[str]]:
    """Load the newest checkpoint, the same one in all processes; return the changed options that apply."""
    mine: list[tuple[Path, dict[str, Any]]] = []  # read by the first process while it searches for the newest

    def look() -> Path | None:
        mine.extend([found] if (found := checkpoints.newest()) else [])
        return mine[0][0] if mine else None

    path = distributed.shared(look)
    if path is None:
        return None, []
    content = mine[0][1] if mine else complete(load_checkpoint(path), path)
    if content["kind"] != stage.kind:
        raise InputError(f"{path} is of stage={content['kind']}, this run is stage={stage.kind}; resume its own run.")
    if content["seed"] != stage.seed:
        raise InputError(f"seed={stage.seed} but {path} was made with seed={content['seed']}; resume with that seed.")
    before = content["data"].get("manifest_hash")
    if manifest_hash is not None and before is not None and before != manifest_hash:
        raise InputError(f"{path} was trained on other data (its manifest differs); start a new run with init_from.")
    images = settings.micro_batch * settings.accumulate * distributed.world_size()
    changes = compare(content, record, images, checkpoints.folder.parent)
    stage.restore(content)
    return (path, content), changes


def _from_notes(found: Found) -> dict[str, Any]:
    return {"notes": found[1]["notes"]} if found else {}


def _introduce(
    stage: Stage, settings: TrainerSettings, progress: StepProgress, found: Found, changes: Sequence[str]
) -> None:
    progress.say(summary(stage, settings))
    progress.say(rates_line(stage))
    if found is not None:
        progress.say(f"resuming from step {stage.step} in {found[0]}")
    for change in changes:
        progress.say(f"changed option: {change}")


def _arrange(stage: Stage, settings: TrainerSettings) -> None:
    """Compilation; it changes no name and no value in a checkpoint."""
    if settings.compile:
        next(iter(stage.saved().values())).compile()  # in place: names get no prefix


_SHOWN = 6  # names of images in a line


class _Endless:
    """An iterable only, so that Lightning neither counts nor rebuilds the loader."""

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
    lightning = next((part for part in loop.callbacks if isinstance(part, LightningCallbacks)), None)
    trainer = make_trainer(stage, settings, loop, lightning)
    stage.train()
    try:
        trainer.fit(stage, _Endless(train_batches(stage.position)))
    except Exception as error:
        _stop_reporting_workers()
        known = explained(error, loop)
        # the signal may have reached the loader's workers too; the state is still that of the last complete step
        if stop.signal is None or stage.updating or distributed.joined() or isinstance(error, InputError):
            if known is None:
                raise
            raise known from error
        loop.save()


def _stop_reporting_workers() -> None:
    """torch raises from a signal handler for every loader worker that dies, also while the first fault is handled."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def explained(error: Exception, loop: Loop) -> InputError | None:
    """The InputError for a dead loader worker or process and for exhausted memory; None for any other fault."""
    text = str(error).strip() or type(error).__name__
    reason = text.splitlines()[0][:200].rstrip(".")
    kept = f"the newest checkpoint is {loop.newest()}" if loop.newest() else "no checkpoint was written yet"
    if "DataLoader worker" in text or isinstance(error, EOFError | ConnectionError):
        advice = "if memory ran out, fewer data.workers or a smaller micro_batch help"
        return InputError(f"a loader process ended ({reason}); {kept}; run the command again to continue, {advice}.")
    if lost := distributed.lost(error):
        return InputError(f"another process of this run ended ({lost}); {kept}; run the command again to continue.")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return InputError(f"memory ran out ({reason}); {kept}; use a smaller trainer.micro_batch, or accumulate more.")
    return None


def unread(session: Session) -> list[str]:
    """Last lines of a run: the images that could not be read."""
    lines = []
    for what, names in (("training", session.skipped), ("validation", session.val_skipped)):
        if names:
            examples = "; ".join(f"{name}: {why}" for name, why in sorted(names.items())[:_SHOWN])
            total = f" of {session.val_seen}" if what == "validation" else ""
            lines.append(f"{len(names)}{total} {what} images could not be read: {examples}; all in {SKIPPED}")
    return lines


def _leave(loop: Loop, stop: StopRequest, run: RunFolder, resume_command: str) -> None:
    """Print where the run stopped and how to resume it."""
    if distributed.rank() == 0:
        how = f"; resume with: {resume_command}" if resume_command else ""
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
