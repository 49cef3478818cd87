"""Train a stage in a run folder: from the start, or from the newest checkpoint found there."""

import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ldmlab import distributed
from ldmlab.checkpoints import load_exactly
from ldmlab.errors import InputError, first_line, lost_loader, memory_ran_out
from ldmlab.training import precision
from ldmlab.training.callbacks.average_snapshots import Averaging
from ldmlab.training.callbacks.keep_checkpoints import KeepCheckpoints
from ldmlab.training.callbacks.skipped import Skipped
from ldmlab.training.checkpointing import Checkpoints, Files
from ldmlab.training.data_module import Batches
from ldmlab.training.engine import Compiled, check_graphs, make_trainer, rates_line, summary
from ldmlab.training.loggers import RunFiles, close_all, lost_rows, open_all
from ldmlab.training.random_state import RandomState
from ldmlab.training.resume import Record, compare
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.signals import Interrupted, StopRequest
from ldmlab.training.stage import Stage
from ldmlab.training.step_metrics import LogMetrics, StepProgress
from ldmlab.training.strategies import Sharded, strategy_of
from ldmlab.training.validation import validation_line


def fit(
    stage: Stage,
    batches: Batches,
    *,
    run: RunFolder,
    settings: TrainerSettings,
    callbacks: Sequence[Any] = (),  # of Lightning; engine.checked
    loggers: Sequence[Any] = (),
    resume_command: str = "",  # printed by a stopped run: how to resume it
    record: Record | None = None,  # configuration and model, which a resumed run is compared by
    fields: Mapping[str, Any] | None = None,  # more settings for the loggers
    begin: Callable[[], None] = lambda: None,  # writes what else a run folder holds from its first step on
) -> Path:
    """Train to `stage.max_steps`; the path of the last checkpoint. A signal saves and ends in SystemExit(128 + n).

    Nothing is written before the newest checkpoint was read and compared, nor in a run that is finished, where only
    incomplete files of killed processes are deleted.
    """
    distributed.join()
    lines = _checked(stage, settings)
    record = record or Record()
    checkpoints, files = Checkpoints(run.checkpoints, settings.keep), Files()
    if (own := precision.plugin(settings.precision)) is not None:
        own.convert_module(stage)  # before a checkpoint of that precision is taken up
    path, changes = _take_up(stage, checkpoints, files, settings, batches, record)
    if path is not None and stage.step >= stage.max_steps:
        checkpoints.sweep()  # it may have been killed while it deleted an old one, after its last step
        return path
    run.begin()
    checkpoints.sweep()
    begin()
    with StopRequest(settings.checkpoint_every_minutes) as stop, StepProgress(distributed.rank() == 0) as progress:
        keep = KeepCheckpoints(checkpoints, settings, stop, batches.record, record)
        parts = _in_order(callbacks, settings, stop, progress, keep)
        trainer = make_trainer(stage, settings, parts, [RunFiles(), *loggers], [files], run.path)
        _introduce(lines, stage.step, progress, path, changes)
        open_all(trainer.loggers, run, {**record.config, **(fields or {})}, stage.step)
        _train(trainer, stage, batches, path, stop, checkpoints, files)
    return _end(stage, run, settings, stop, checkpoints, resume_command)


def _checked(stage: Stage, settings: TrainerSettings) -> list[str]:
    """What a run prints first; InputError, before anything is written, where stage and settings do not fit."""
    settings.check_device()
    stage.sharded = isinstance(strategy_of(stage, settings), Sharded)
    check_graphs(settings.compile, stage)
    return [summary(stage, settings), rates_line(stage)]


def _in_order(
    callbacks: Sequence[Any],
    settings: TrainerSettings,
    stop: StopRequest,
    progress: StepProgress,
    keep: KeepCheckpoints,
) -> list[Any]:
    """All callbacks: what is saved before a stop saves, what logs before the row, and the row before the checkpoint."""
    counted = any(isinstance(part, Skipped) for part in callbacks)
    given = [*callbacks, *([] if counted else [Skipped(float("inf"))])]
    kept = [part for part in given if _keeps_state(part)]
    first = [Compiled(settings.compile, progress.say), Averaging(), RandomState(), *kept, stop]
    others = [part for part in given if part not in kept]
    return [*first, *others, LogMetrics(settings.gradient_alarm), progress, keep]


def _keeps_state(part: Any) -> bool:
    """Whether a callback has something in checkpoints, which a stop must not save before the step has changed it."""
    own, base = type(part), pl.Callback
    return own.on_save_checkpoint is not base.on_save_checkpoint or own.state_dict is not base.state_dict


def _train(
    trainer: pl.Trainer,
    stage: Stage,
    batches: Batches,
    path: Path | None,
    stop: StopRequest,
    checkpoints: Checkpoints,
    files: Files,
) -> None:
    """Fit, and close the loggers; a fault is raised in a sentence where there is one."""
    success = False
    stage.train()
    try:
        with files:
            trainer.fit(stage, batches, ckpt_path=path, weights_only=True)
        success = True
    except Interrupted:
        pass
    except Exception as error:
        if threading.current_thread() is threading.main_thread():
            # torch raises from a signal handler for every loader worker that dies, also while a fault is handled
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not stop.lost_workers(stage, error):  # they died of the signal too, and the state is saved
            known = explained(error, checkpoints)
            if known is None:
                raise
            raise known from error
    finally:
        close_all(trainer.loggers, "success" if success else "failed")


def _end(
    stage: Stage,
    run: RunFolder,
    settings: TrainerSettings,
    stop: StopRequest,
    checkpoints: Checkpoints,
    resume_command: str,
) -> Path:
    """The last checkpoint. A stopped run says where it stopped and how to resume it; a trial leaves nothing behind."""
    if (last := distributed.shared(checkpoints.last)) is None:
        raise InputError(
            "no step was trained, so there is no checkpoint; change the options of trainer that forbid it."
        )
    if stop.interrupted:
        how = f"; resume with: {resume_command}" if resume_command else ""
        line = validation_line(stage.validated, stage.validated_at)
        distributed.say(f"saved step {stage.step} in {last}{line}{how}")
        distributed.barrier()
        run.close()
        stop.pass_on()
        raise SystemExit(stop.exit_code)
    if settings.fast_dev_run:
        run.discard()
    return last


def _take_up(
    stage: Stage,
    checkpoints: Checkpoints,
    files: Files,
    settings: TrainerSettings,
    batches: Batches,
    record: Record,
) -> tuple[Path | None, list[str]]:
    """Load the newest checkpoint, the same one in all processes; return it and the changed options that apply."""

    found = checkpoints.newest()
    if found is None:
        return None, []
    path, content = found
    files.held = content
    if content["kind"] != stage.kind:
        raise InputError(f"{path} is of stage={content['kind']}, this run is stage={stage.kind}; resume its own run.")
    if content["seed"] != stage.seed:
        raise InputError(f"seed={stage.seed} but {path} was made with seed={content['seed']}; resume with that seed.")
    before = content["data"].get("manifest_hash")
    if batches.manifest_hash is not None and before is not None and before != batches.manifest_hash:
        raise InputError(f"{path} was trained on other data (its manifest differs); start a new run with init_from.")
    if settings.fast_dev_run:
        raise InputError(
            f"trainer.fast_dev_run={settings.fast_dev_run} leaves nothing behind, but {path} is of a run; leave out "
            "run.dir, or fast_dev_run."
        )
    images = settings.micro_batch * settings.accumulate * distributed.world_size()
    changes = compare(content, record, images, checkpoints.folder.parent)
    stage.restore(content)
    batches.by_shard = bool(content["data"].get("by_shard"))
    every = settings.log_every if stage.step < stage.max_steps else 1
    if lost := lost_rows(checkpoints.folder.parent / "metrics.csv", stage.step - stage.unvalidated, every):
        distributed.say(lost)
    return path, changes


def _introduce(
    lines: Sequence[str], step: int, progress: StepProgress, path: Path | None, changes: Sequence[str]
) -> None:
    resumed = [f"resuming from step {step} in {path}"] if path is not None else []
    for line in [*lines, *resumed, *(f"changed option: {change}" for change in changes)]:
        progress.say(line)


def explained(error: Exception, checkpoints: Checkpoints) -> InputError | None:
    """The InputError for a dead loader worker or process, exhausted memory, and options that Lightning cannot use."""
    text, reason = str(error).strip() or type(error).__name__, first_line(error).rstrip(".")
    newest = checkpoints.last()
    kept = f"the newest checkpoint is {newest}" if newest else "no checkpoint was written yet"
    if ended := lost_loader(error):
        advice = "if memory ran out, fewer data.workers or a smaller micro_batch help"
        return InputError(f"a loader process ended ({ended}); {kept}; run the command again to continue, {advice}.")
    if isinstance(error, MisconfigurationException | ImportError) or text.startswith("Early stopping conditioned"):
        return InputError(
            f"callbacks, logger or trainer: {' '.join(text.split())[:900].rstrip('.')}; change the option."
        )
    if lost := distributed.lost(error):
        return InputError(f"another process of this run ended ({lost}); {kept}; run the command again to continue.")
    if memory_ran_out(error):
        return InputError(f"memory ran out ({reason}); {kept}; use a smaller trainer.micro_batch, or accumulate more.")
    return None


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
