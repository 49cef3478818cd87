"""Interface of a run's callbacks; Lightning's own callbacks have other counters and are not used."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ldmlab import distributed
from ldmlab.training.loggers import Loggers
from ldmlab.training.run_folder import RunFolder
from ldmlab.training.stage import Batch, Stage

SKIPPED = "skipped.txt"  # in a run folder: a line an image that could not be read
_NAMED = 10  # of them on the screen at once


@dataclass
class Session:
    """The parts of a running fit that callbacks share."""

    stage: Stage
    run: RunFolder
    loggers: Loggers
    val_batches: Callable[[], Iterable[Batch]]  # this process's share, from the start at every call
    skipped: dict[str, str] = field(default_factory=dict)  # images that could not be read: name => reason, of all
    val_skipped: dict[str, str] = field(default_factory=dict)  # the same of validation images
    val_seen: int = 0  # validation images of the latest evaluation, over all processes
    notes: dict[str, Any] = field(default_factory=dict)  # what a checkpoint keeps for callbacks, plain types only

    def batches(self) -> Iterator[Batch]:
        """Validation batches on the stage's device."""
        for index, batch in enumerate(self.val_batches()):
            yield self.stage.transfer_batch_to_device(batch, self.stage.device, index)

    def evaluate(self) -> dict[str, float]:
        """The stage's validation metrics, with averaged weights; unreadable images are listed and counted."""
        here: dict[str, str] = {}
        seen = 0

        def noted() -> Iterator[Batch]:
            nonlocal seen
            for batch in self.batches():
                here.update(named(batch))
                seen += len(batch.get("key", ()))
                yield batch

        with self.stage.evaluating():
            values = self.stage.validate(noted())
        shares = distributed.gather((here, seen))
        new = {name: why for part, _ in shares for name, why in part.items() if name not in self.val_skipped}
        self.val_skipped |= new
        self.val_seen = sum(count for _, count in shares) + len(self.val_skipped)
        self.note(new, "validation images")
        return values

    def note(self, new: dict[str, str], what: str) -> None:
        """Name images that could not be read on stderr and in skipped.txt of the run folder."""
        if not new or distributed.rank():
            return
        lines = [f"{name}: {why}" for name, why in sorted(new.items())]
        more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
        distributed.say(f"{what} that cannot be read, left out: {'; '.join(lines[:_NAMED])}{more}")
        if self.run is not None and self.run.path.is_dir():
            with open(self.run.path / SKIPPED, "a", encoding="utf-8", errors="replace") as file:
                file.writelines(f"{what}: {' '.join(line.split())}\n" for line in lines)

    def log_panels(self) -> None:
        """The stage's images to every logger, made by the first process while the others wait."""
        if distributed.rank() == 0:
            with self.stage.evaluating():
                panels = self.stage.panels(self.batches())
                labels = self.stage.panel_labels(self.batches())
            for name, images in panels.items():
                title = self.stage.panel_titles.get(name, "")
                self.loggers.log_images(name, images, self.stage.step, labels.get(name), title)
        distributed.barrier()


def named(batch: Batch) -> dict[str, str]:
    """The images that the loader could not read for a batch: name => reason."""
    parts = [str(entry).partition(": ") for entry in batch.get("skipped") or []]
    return {name: reason for name, _, reason in parts}


class StepCallback:
    """Hooks of a run, all optional; every process calls them in the same order."""

    chooses_best: bool = False  # whether it, and not validation, decides which checkpoint is best
    improved: bool = False  # with `chooses_best`: this step is the best so far

    def start(self, session: Session) -> None:
        """Once, before the first step of this process."""

    def after_batch(self, session: Session, batch: Batch) -> None:
        """After each micro-batch; must not wait for the device."""

    def metrics(self, session: Session) -> dict[str, float]:
        """Metrics for a row of the log, called every `log_every` steps."""
        return {}

    def evaluate(self, session: Session) -> dict[str, float]:
        """Metrics for this step's row of the log, if any; called after each step."""
        return {}

    def after_step(self, session: Session) -> None:
        """After each step, between its row of the log and its checkpoint."""
