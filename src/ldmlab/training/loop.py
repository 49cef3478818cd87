"""What happens at the end of a step: metrics, images, checkpoint, stop; every count is `Stage.step`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldmlab import distributed
from ldmlab.training.callbacks.base import Session, StepCallback
from ldmlab.training.callbacks.validate import Validate
from ldmlab.training.checkpointing import Checkpoints
from ldmlab.training.progress import StepProgress
from ldmlab.training.random_state import random_state, restore_random_state, seed_process
from ldmlab.training.resume import Record
from ldmlab.training.settings import TrainerSettings
from ldmlab.training.signals import StopRequest
from ldmlab.training.stage import Batch, Stage


class Loop(pl.Callback):
    """The one Lightning callback of a run; it drives ours."""

    def __init__(
        self,
        session: Session,
        settings: TrainerSettings,
        callbacks: Sequence[StepCallback],
        checkpoints: Checkpoints,
        progress: StepProgress,
        stop: StopRequest,
        random_states: list[dict[str, Any]],  # of all processes, from the checkpoint; empty in a new run
        manifest_hash: str | None,
        record: Record,
    ) -> None:
        self.session, self.settings, self.stop = session, settings, stop
        self.callbacks, self.checkpoints, self.progress = list(callbacks), checkpoints, progress
        chooses_best = [callback for callback in self.callbacks if callback.chooses_best]
        self.validate = Validate(settings.validate_every, chooses_best=not chooses_best)
        self.chooser: StepCallback = chooses_best[0] if chooses_best else self.validate  # of which checkpoint is best
        self.manifest_hash, self.record = manifest_hash, record
        self.last_checkpoint: Path | None = None
        self._random_states = random_states

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The clock starts."""
        for callback in self.callbacks:
            callback.start(self.session)
        self.progress.start(self.session.stage)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first batch is loaded; from here on only the networks use random numbers."""
        if batch_idx:
            return
        rank = distributed.rank()
        if len(self._random_states) == distributed.world_size():
            restore_random_state(self._random_states[rank])
        else:  # a new run, or one resumed with another number of processes
            stage = self.session.stage
            seed_process(stage.seed + stage.step, rank)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Everything that is due after this micro-batch."""
        for callback in self.callbacks:
            callback.after_batch(self.session, batch)
        stage = self.session.stage
        if not stage.step_complete:
            return
        stopping, last = self.stop.agreed(stage.step, stage.device), stage.step >= stage.max_steps
        if stopping:  # at once: the signal may not wait for an evaluation
            self.save()
        self._log(stage)
        for callback in self.callbacks:
            callback.after_step(self.session)
        self.progress.step(stage)
        if self.chooser.improved:  # before the checkpoint that refers to this one
            self._save_best()
        if stopping or last or stage.step % self.settings.checkpoint_every == 0:
            self.save()
        trainer.should_stop = stopping or last

    def _log(self, stage: Stage) -> None:
        """One row a step at most: training metrics when due, validation metrics when due."""
        row: dict[str, float] = {}
        if stage.step % self.settings.log_every == 0 or stage.step in (1, stage.max_steps):
            row = stage.metrics.read()
            row |= {f"learning_rate/{group}": rate for group, rate in stage.rates().items()}
            row["images"] = float(stage.position)
            for callback in self.callbacks:
                row |= callback.metrics(self.session)
        row |= self.validate.metrics(self.session)
        for callback in self.callbacks:
            row |= callback.evaluate(self.session)
        if row:
            self.session.loggers.log_metrics(row, stage.step)

    def content(self) -> dict[str, Any]:
        """Content of a checkpoint; a collective call: every process must make it."""
        stage = self.session.stage
        stage.metrics.check()  # nothing that is not finite gets into a checkpoint
        states = distributed.gather(random_state())
        return {
            **(stage.state() if distributed.rank() == 0 else {}),
            "rng": states,
            "data": {"manifest_hash": self.manifest_hash},
            "notes": self.session.notes,
            "run": vars(self.record),
        }

    def newest(self) -> Path | None:
        """The newest checkpoint of the run, of this process or an earlier one."""
        return next(iter(self.checkpoints.by_age()[-1:]), None)

    def save(self) -> None:
        """A checkpoint of this step."""
        content = self.content()
        if distributed.rank() == 0:
            self.last_checkpoint = self.checkpoints.save(content)
        distributed.barrier()

    def _save_best(self) -> None:
        content = self.content()
        if distributed.rank() == 0:
            self.checkpoints.save_best(content)
        distributed.barrier()
