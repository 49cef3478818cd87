"""What a callback of a run sees and may do; Lightning's own callbacks count other things and are not used."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ldmlab import distributed
from ldmlab.training.loggers import Loggers
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.stage import Batch, Stage


@dataclass
class Session:
    """The parts of a running fit that callbacks share."""

    stage: Stage
    run: RunFolder
    loggers: Loggers
    val_batches: Callable[[], Iterable[Batch]]  # this process's share, from the start at every call
    skipped: int = 0  # images that could not be read, over all processes
    notes: dict[str, Any] = field(default_factory=dict)  # what a checkpoint keeps for callbacks, plain types only

    def batches(self) -> Iterator[Batch]:
        """Held-out batches on the stage's device."""
        for index, batch in enumerate(self.val_batches()):
            yield self.stage.transfer_batch_to_device(batch, self.stage.device, index)

    def evaluate(self) -> dict[str, float]:
        """The stage's validation metrics, with averaged weights."""
        with self.stage.evaluating():
            return self.stage.validate(self.batches())

    def log_panels(self) -> None:
        """The stage's images to every logger, drawn by the first process while the others wait."""
        if distributed.rank() == 0:
            with self.stage.evaluating():
                panels = self.stage.panels(self.batches())
            for name, images in panels.items():
                self.loggers.log_images(name, images, self.stage.step)
        distributed.barrier()


class StepCallback:
    """Hooks of a run, all optional; every process calls them in the same order."""

    chooses_best: bool = False  # whether it, and not validation, decides which checkpoint is best
    improved: bool = False  # with `chooses_best`: this step is the best so far

    def start(self, session: Session) -> None:
        """Once, before the first step of this process."""

    def after_batch(self, session: Session, batch: Batch) -> None:
        """After each micro-batch; must not wait for the device."""

    def metrics(self, session: Session) -> dict[str, float]:
        """Numbers for a row of the log, asked every `log_every` steps."""
        return {}

    def evaluate(self, session: Session) -> dict[str, float]:
        """Numbers for this step's row of the log where the callback has any, asked after each step."""
        return {}

    def after_step(self, session: Session) -> None:
        """After each step, when its row is written and before its checkpoint."""
