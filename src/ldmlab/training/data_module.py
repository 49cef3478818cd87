"""The data of a run as Lightning's Trainer takes them."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytorch_lightning as pl

from ldmlab import distributed
from ldmlab.training.random_state import isolated_random

Batch = dict[str, Any]


class Batches(pl.LightningDataModule):
    """The loaders of a run: training continues at the stage's position, validation starts anew every time."""

    def __init__(
        self,
        train: Callable[[int], Iterable[Batch]],  # position to start from => endless micro-batches
        val: Callable[[], Iterable[Batch]] = list,  # this process's share
        manifest_hash: str | None = None,  # of the training data; a resumed run must have the same
    ) -> None:
        super().__init__()
        self.train, self.val, self.manifest_hash = train, val, manifest_hash
        self.waited = 0.0  # seconds that training waited for its batches
        self.by_shard = True  # see `order.training_batches`; a run keeps what its first checkpoint records

    @property
    def record(self) -> dict[str, Any]:
        """What checkpoints hold of it."""
        return {"manifest_hash": self.manifest_hash, "by_shard": self.by_shard}

    def train_dataloader(self) -> Iterable[Batch]:
        """Endless, without a length, so that one epoch is the whole run unless `limit_train_batches` ends it."""
        return _Restarted(self._training, self._timed)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the time until each has come is added to `waited`."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def val_dataloader(self) -> Iterable[Batch]:
        """Batches of this process on the host; where networks are sharded, equally many on all processes."""
        trainer: Any = self.trainer
        return _Restarted(self._filled if getattr(trainer.strategy, "shards", False) else self.val)

    def _filled(self) -> Iterator[Batch]:
        """A process without a batch left repeats one, marked `filler`, since every pass needs all processes."""
        own: Iterator[Batch] = iter(self.val())
        latest: Batch = {}
        while any(found := distributed.gather((batch := next(own, None)) is not None)):
            if not latest and not all(found):
                latest = next(part for part in distributed.gather(batch) if part is not None)
            latest = batch or latest
            yield batch or {**latest, "skipped": [], "filler": True}

    def _training(self) -> Iterable[Batch]:
        trainer: Any = self.trainer
        position = trainer.lightning_module.position
        if not trainer.overfit_batches:
            return self.train(position)
        return ({**batch, "position": batch["position"] + position} for batch in self.train(0))  # noise stays new


class _Restarted:
    """An iterable that begins anew at every `iter`, without a trace in the random state."""

    def __init__(
        self, start: Callable[[], Iterable[Batch]], watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter
    ) -> None:
        self._start, self._watch = start, watch

    def __iter__(self) -> Iterator[Batch]:
        with isolated_random(0):
            return self._watch(iter(self._start()))
