"""The data of a run as Lightning's Trainer takes them, and the images of panels.

Panels are made by all processes: each takes part of the images, and all run their networks equally often.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.errors import InputError
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
        """A process without images repeats a batch, marked `filler`, since every pass needs all processes."""
        own: Iterator[Batch] = iter(self.val())
        latest: Batch = {}
        while True:
            batch = next(own, None)
            sizes = distributed.gather(_size(batch))
            if sizes.count(None) == len(sizes):
                return
            batch = batch or {"position": torch.zeros(0, dtype=torch.int64), "skipped": []}
            if any(sizes) and not latest and not all(sizes):
                latest = next(part for part in distributed.gather(batch) if _size(part))
            if any(sizes) and not _size(batch):
                yield {**latest, "skipped": batch["skipped"], "filler": True}
            else:
                latest = batch if _size(batch) else latest
                yield batch

    def _training(self) -> Iterable[Batch]:
        trainer: Any = self.trainer
        position = trainer.lightning_module.position
        if not trainer.overfit_batches:
            return self.train(position)
        return ({**batch, "position": batch["position"] + position} for batch in self.train(0))  # noise stays new


def _size(batch: Batch | None) -> int | None:
    """Images in it; 0 where none could be read."""
    return None if batch is None else len(batch["position"])


class _Restarted:
    """An iterable that begins anew at every `iter`, without a trace in the random state."""

    def __init__(
        self, start: Callable[[], Iterable[Batch]], watch: Callable[[Iterator[Batch]], Iterator[Batch]] = iter
    ) -> None:
        self._start, self._watch = start, watch

    def __iter__(self) -> Iterator[Batch]:
        with isolated_random(0):
            return self._watch(iter(self._start()))


def first_images(batches: Iterable[Batch], count: int, device: torch.device | None = None) -> Batch:
    """The first `count` images by position over all processes' batches, on every process (and its `device`)."""
    parts: list[Batch] = []
    for batch in batches:
        parts.append({name: value for name, value in batch.items() if name != "skipped"})
        if sum(len(part["position"]) for part in parts) >= count:
            break
    own = _selected(_joined(parts), range(count)) if parts else None
    if distributed.joined():
        own = _first_of_all(own, count, device)
    if own is None or not len(own["position"]):
        raise InputError(
            "the validation split is empty, so there is nothing to show in panels; give data.val, or callbacks=quiet."
        )
    return own


def slice_of_process(batch: Batch) -> Batch:
    """Images rank, rank + world, ... of a batch that all processes hold; from its start again where some have fewer."""
    rank, world, count = distributed.rank(), distributed.world_size(), len(batch["position"])
    return _selected(batch, [i % count for i in range(rank, rank + world * -(-count // world), world)])


def gathered(rows: Tensor, count: int) -> Tensor:
    """What the processes made of their slices, one row an image, as rows of the whole batch, on the CPU."""
    parts = distributed.gather(rows.cpu())
    return torch.stack([parts[i % len(parts)][i // len(parts)] for i in range(count)])


def _first_of_all(own: Batch | None, count: int, device: torch.device | None) -> Batch | None:
    """The images of the lowest positions among those of all processes."""
    mine = own["position"].tolist() if own is not None else []
    chosen = sorted(position for part in distributed.gather(mine) for position in part)[:count]
    sent = None
    if own is not None:
        rows = _selected(own, [i for i, position in enumerate(mine) if position in set(chosen)])
        sent = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in rows.items()}
    full = [part for part in distributed.gather(sent) if part is not None and len(part["position"])]
    if not full:
        return None
    batch = _joined(full)
    ordered = _selected(batch, batch["position"].argsort().tolist())
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in ordered.items()}


def _joined(parts: list[Batch]) -> Batch:
    joined: Batch = {}
    for name, value in parts[0].items():
        if isinstance(value, Tensor):
            with torch.autocast(value.device.type, enabled=False):  # which refuses float16 on a CPU: stored states are
                joined[name] = torch.cat([part[name] for part in parts])
        else:
            joined[name] = [item for part in parts for item in part[name]]
    return joined


def _selected(batch: Batch, rows: Iterable[int]) -> Batch:
    kept = [row for row in rows if row < len(batch["position"])]
    return {
        name: value[kept] if isinstance(value, Tensor) else [value[row] for row in kept]
        for name, value in batch.items()
    }
