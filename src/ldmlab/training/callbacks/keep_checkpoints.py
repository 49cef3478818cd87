"""When the checkpoints of a run are saved, and which one is the best."""

import io
import math
import pickle
from collections.abc import Mapping
from typing import Any, Literal

import pytorch_lightning as pl
import torch

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.training.checkpointing import FORMAT_VERSION, Checkpoints
from ldmlab.training.resume import Record
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.signals import Interrupted, StopRequest


class KeepCheckpoints(pl.callbacks.Checkpoint):
    """Saves at the end of a step, after its validation: every so often, the best, the last, and on a signal."""

    def __init__(
        self,
        files: Checkpoints,
        settings: TrainerSettings,
        stop: StopRequest,
        data: Mapping[str, Any],  # what checkpoints hold of the batches
        record: Record,
    ) -> None:
        self.files, self.settings, self.stop = files, settings, stop
        self.data, self.record = data, record
        self.notes: dict[str, Any] = {}  # val: the latest metrics; best: name, value and step
        self.improved = False  # the running step is the best so far

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Validation decides which checkpoint is best, unless a callback does."""
        self.by_validation = not any(getattr(callback, "chooses_best", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.notes = checkpoint["notes"]

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """What describes the run and its data."""
        run = {"run": dict(vars(self.record)), "notes": self.notes}
        checkpoint |= {"format_version": FORMAT_VERSION, "data": dict(self.data), **run}
        for name, state in checkpoint.get("callbacks", {}).items():
            try:
                torch.save(state, box := io.BytesIO())
                torch.load(io.BytesIO(box.getvalue()), weights_only=True)
            except (pickle.PickleError, AttributeError, TypeError) as error:
                raise InputError(  # no checkpoint of the run could be read again
                    f"callbacks: the state of {name.partition('{')[0]} holds more than tensors and plain types, which "
                    "a checkpoint may not; change its state_dict()."
                ) from error

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """The end of a step without validation."""
        if pl_module.step_complete and not pl_module.validation_due:
            self._end_step(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The end of a step with validation; a metric that is not finite is never the best."""
        if trainer.sanity_checking:
            return
        step, values = pl_module.step, pl_module.validated
        if bad := [name for name, value in values.items() if not math.isfinite(value)]:
            best = self.notes.get("best", {}).get("step")
            kept = f"the best checkpoint stays that of step {best}" if best else "there is no best checkpoint yet"
            distributed.say(f"step {step}: val/{bad[0]} is {values[bad[0]]}, which is never the best; {kept}")
        if self.by_validation and values:  # none without validation data
            name = pl_module.monitor
            self.improved = improves(self.notes, step, name, values[name], pl_module.monitor_mode)
        self.notes["val"] = {"step": step, **values}
        self._end_step(trainer, pl_module)

    def _end_step(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.strategy.checkpoint_io.wait(for_end=False)  # type: ignore[attr-defined]
        due = self.stop.save_due or pl_module.step % self.settings.checkpoint_every == 0
        due = due or self.stop.stopping or trainer.should_stop
        if self.improved or due:
            self.save(trainer, pl_module, due)
        if self.stop.stopping:
            raise Interrupted

    def save(self, trainer: pl.Trainer, pl_module: Any, due: bool = True) -> None:
        """A checkpoint of this step; a collective call.

        due: also if it is not the best. The best comes first: the other one refers to it.
        """
        paths = [self.files.best_path(self.notes["best"])] if self.improved else []
        paths += [self.files.path(pl_module.step)] if due else []
        note = dict(self.notes["best"]) if self.improved else None
        self.improved = False
        trainer.save_checkpoint(paths[0], storage_options=(paths[1:], lambda: self.files.prune(note)))

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """A signal may have reached the loader's workers too; the state is still that of the last complete step."""
        if self.stop.lost_workers(pl_module, exception):
            self.save(trainer, pl_module)


def improves(
    notes: dict[str, Any],
    step: int,
    name: str,
    value: float,
    mode: Literal["min", "max"],
    measured_by: str = "",
) -> bool:
    """Whether `value` is the best yet, and if so note it.

    Values of another metric, or measured in another way before a restart, are ignored.
    """
    if not math.isfinite(value):
        return False
    before = notes.get("best")
    if before is not None and (before["name"], before.get("measured_by", "")) == (name, measured_by):
        better = value < before["value"] if mode == "min" else value > before["value"]
        if not better:
            return False
    note = {"name": name, "value": value, "step": step}
    notes["best"] = {**note, "measured_by": measured_by} if measured_by else note
    return True
