"""Images that could not be read: counted and listed; above a limit the run ends."""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from ldmlab import distributed
from ldmlab.errors import InputError

FILE = "skipped.txt"  # in a run folder: a line an image that could not be read
_LEAST_IMAGES = 1000  # a share of fewer images is not informative
_NAMED = 10  # on the screen at once
_SHOWN = 6  # at the end of a run


class Skipped(pl.Callback):
    """Counts `skipped` of the batches, names them, and stops the run above `max_fraction` of the images read."""

    def __init__(self, max_fraction: float = 0.01) -> None:
        self.max_fraction = max_fraction
        self.names: dict[str, dict[str, str]] = {"training": {}, "validation": {}}  # image => reason, of all processes
        self._new: dict[str, dict[str, str]] = {"training": {}, "validation": {}}  # of this process
        self._count = self._val_seen = 0  # of this process; the same image in another epoch counts again
        self._total = self._start = self._val_total = 0  # over all processes

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Shares count from the start of this process, also in a row that comes with a validation now."""
        self._start = pl_module.position
        if pl_module.unvalidated and pl_module.row_due:
            pl_module.log("data/skipped", 0.0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Record the samples that the loader replaced; at a row data/skipped, the count so far."""
        self._new["training"] |= _named(batch)
        self._count += len(batch.get("skipped") or [])
        if pl_module.step_complete and pl_module.row_due:
            self._total += self._gather("training", self._count, trainer)
            self._count = 0
            self._check("training", self._total, pl_module.position - self._start)
            pl_module.log("data/skipped", float(self._total))

    def on_validation_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """The same of validation images."""
        self._new["validation"] |= _named(batch)
        self._val_seen += len(batch.get("key", ())) * ("filler" not in batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """data/val_skipped, where there is any; the same share holds."""
        seen = self._gather("validation", self._val_seen, trainer)
        count = len(self.names["validation"])
        self._val_seen, self._val_total = 0, seen + count
        if count:
            pl_module.log("data/val_skipped", float(count))
        self._check("validation", count, self._val_total)

    def _gather(self, what: str, count: int, trainer: pl.Trainer) -> int:
        """Counts of all processes; new names go to stderr and to skipped.txt of the run folder."""
        shares = distributed.gather((self._new[what], count))
        known, self._new[what] = self.names[what], {}
        new = {name: why for part, _ in shares for name, why in part.items() if name not in known}
        known |= new
        if new and distributed.rank() == 0:
            lines = [f"{name}: {why}" for name, why in sorted(new.items())]
            more = f" and {len(lines) - _NAMED} more" if len(lines) > _NAMED else ""
            distributed.say(f"{what} images that cannot be read, left out: {'; '.join(lines[:_NAMED])}{more}")
            with open(Path(trainer.default_root_dir) / FILE, "a", encoding="utf-8", errors="replace") as file:
                file.writelines(f"{what} images: {' '.join(line.split())}\n" for line in lines)
        return sum(number for _, number in shares)

    def _check(self, what: str, count: int, seen: int) -> None:
        if count > self.max_fraction * max(seen, _LEAST_IMAGES):
            example = next((f" (such as {name}: {why})" for name, why in self.names[what].items()), "")
            raise InputError(
                f"{count} of {seen} {what} images could not be read{example}, more than "
                f"callbacks.skipped.max_fraction={self.max_fraction}; fix the shards or raise it."
            )

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Last lines of a run, where images could not be read."""
        for what, names in self.names.items():
            if names:
                examples = "; ".join(f"{name}: {why}" for name, why in sorted(names.items())[:_SHOWN])
                total = f" of {self._val_total}" if what == "validation" else ""
                distributed.say(f"{len(names)}{total} {what} images could not be read: {examples}; all in {FILE}")


def _named(batch: dict[str, Any]) -> dict[str, str]:
    """The images that the loader could not read for a batch: name => reason."""
    parts = [str(entry).partition(": ") for entry in batch.get("skipped") or []]
    return {name: reason for name, _, reason in parts}
