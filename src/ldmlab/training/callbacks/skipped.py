"""Images that could not be read: counted and listed; above a limit the run ends."""

from dataclasses import dataclass, field

from ldmlab import distributed
from ldmlab.errors import InputError
from ldmlab.training.callbacks.base import Session, StepCallback, named
from ldmlab.training.stage import Batch

_LEAST_IMAGES = 1000  # a share of fewer images is not informative


@dataclass
class Skipped(StepCallback):
    """Counts `skipped` of the batches and stops the run above `max_fraction`."""

    max_fraction: float = 0.01  # of the images read
    _here: dict[str, str] = field(default_factory=dict, init=False)  # since the last row, on this process
    _count: int = field(default=0, init=False)  # the same image in another epoch counts again
    _total: int = field(default=0, init=False)  # over all processes
    _start: int = field(default=0, init=False)

    def start(self, session: Session) -> None:
        """Shares count from the start of this process."""
        self._start = session.stage.position

    def after_batch(self, session: Session, batch: Batch) -> None:
        """Record the samples that the loader replaced."""
        names = named(batch)
        self._here |= names
        self._count += len(batch.get("skipped") or [])

    def metrics(self, session: Session) -> dict[str, float]:
        """data/skipped, the count so far; InputError above the configured share."""
        shares = distributed.gather((self._here, self._count))
        self._here, self._count = {}, 0
        self._total += sum(count for _, count in shares)
        new = {name: why for part, _ in shares for name, why in part.items() if name not in session.skipped}
        session.skipped |= new
        session.note(new, "training images")
        self._check(self._total, session.stage.position - self._start, "images", session.skipped)
        return {"data/skipped": float(self._total)}

    def after_step(self, session: Session) -> None:
        """The same share holds for the validation images."""
        self._check(len(session.val_skipped), session.val_seen, "validation images", session.val_skipped)

    def _check(self, count: int, seen: int, what: str, names: dict[str, str]) -> None:
        if count > self.max_fraction * max(seen, _LEAST_IMAGES):
            example = next((f" (such as {name}: {why})" for name, why in names.items()), "")
            raise InputError(
                f"{count} of {seen} {what} could not be read{example}, more than "
                f"callbacks.skipped.max_fraction={self.max_fraction}; fix the shards or raise it."
            )
