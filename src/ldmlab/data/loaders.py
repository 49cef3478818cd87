"""Loaders over a data set keyed by position.

The order of samples is ours (`order.py`): a batch sampler hands positions to the workers and torch's loader returns
the batches in that order, whatever the number of workers. The state of a stream is one integer, the next position.
Workers keep to the processors there are and leave signals to the main process.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.queues import Queue
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ldmlab.data.dataset import Batch, ShardDataset
from ldmlab.data.order import evaluation_batches
from ldmlab.data.workers import processors
from ldmlab.errors import InputError

_LONGEST_TEMPORARY = 107 - len("/pymp-abcdefgh/listener-abcdefgh")  # of a unix socket
T_co = TypeVar("T_co", covariant=True)


class QuietLoader(DataLoader[T_co]):
    """torch's loader; its order of batches does not depend on the number of workers."""

    def __init__(
        self, dataset: Dataset[Any], *, workers: int, on_batch: Callable[[Any], None] | None = None, **options: Any
    ) -> None:
        workers = min(workers, processors())
        folder = tempfile.gettempdir()
        if workers and len(os.fsencode(folder)) > _LONGEST_TEMPORARY:  # where batches are handed over by sockets
            raise InputError(
                f"TMPDIR={folder} is longer than the {_LONGEST_TEMPORARY} characters that loader processes can use; "
                "set a shorter one, or data.workers=0."
            )
        self._on_batch = on_batch  # called with every batch, in the process that reads the loader
        super().__init__(dataset, num_workers=workers, worker_init_fn=quiet_worker if workers else None, **options)

    def __iter__(self) -> Any:
        """Start the workers with SIGTERM blocked: some packages start threads of their own in every forked process,
        before `quiet_worker` runs, and a thread that does not block a signal may be the one to get it."""
        if not hasattr(signal, "sigwaitinfo"):
            return self._watched(super().__iter__())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return self._watched(super().__iter__())
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _watched(self, batches: Iterator[T_co]) -> Iterator[T_co]:
        return map(partial(_noted, self._on_batch), batches) if self._on_batch else batches


def _noted(note: Callable[[Any], None], batch: Any) -> Any:
    note(batch)
    return batch


def quiet_worker(worker: int) -> None:
    """Worker start: Ctrl-C and a scheduler's signals reach the whole group, but only the main process may act on them.

    It needs its workers to finish the step it saves after. SIGTERM still ends a worker when its own parent sends it.
    """
    parent = os.getppid()
    sys.excepthook = partial(_unless_orphaned, parent, sys.excepthook)
    setattr(Queue, "_on_queue_feeder_error", staticmethod(_end_without_room))  # noqa: B010  multiprocessing's own hook
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _end_without_room(error: BaseException, batch: Any) -> None:
    """A batch could not be handed over, which multiprocessing only reports: the main process would wait for ever."""
    reason = " ".join(str(error).split())
    advice = "give /dev/shm more room (docker run --shm-size=8g), or set data.workers=0"
    print(f"a loader process cannot hand over a batch ({reason}); {advice}.", file=sys.stderr, flush=True)
    os._exit(1)


def _unless_orphaned(parent: int, report: Callable[..., None], kind: type, error: BaseException, trace: Any) -> None:
    """What the thread that hands over batches calls when the other end is gone: of a parent that was killed, its
    worker ends too, without a word. The connection breaks a moment before the system names another parent."""
    end = time.monotonic() + 1.0
    while isinstance(error, (ConnectionError, EOFError)) and time.monotonic() < end:
        if os.getppid() != parent:
            os._exit(1)
        time.sleep(0.01)
    report(kind, error, trace)


@dataclass
class Skipped:
    """Images of a split that this process could not read, found by its evaluation loaders so far."""

    total: int = 0  # images of one pass over this process's part of the split
    reasons: dict[str, str] = field(default_factory=dict)  # "SHARD[SAMPLE]" => reason

    @property
    def count(self) -> int:
        """Images that could not be read, each counted once however often it was tried."""
        return len(self.reasons)

    @property
    def names(self) -> list[str]:
        """ "SHARD[SAMPLE]: reason" of each of them, in stored order."""
        return [f"{label}: {reason}" for label, reason in sorted(self.reasons.items())]

    def add(self, batch: Batch) -> None:
        for entry in batch["skipped"]:
            label, _, reason = entry.partition(": ")
            self.reasons[label] = reason


class IndexBatches(Sampler[list[Any]]):
    """What `make` yields, again from the beginning for every iteration of the loader."""

    def __init__(self, make: Callable[[], Iterator[list[Any]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[Any]]:
        return self._make()


def eval_loader(
    dataset: ShardDataset,
    batch_size: int,
    world: int = 1,
    rank: int = 0,
    limit: int | None = None,  # only the first images
    workers: int = 0,
    skipped: Skipped | None = None,  # takes note of the images that cannot be read
    pinned: bool = False,
) -> DataLoader[Batch]:
    """Every image once over all processes, in stored order, never padded; a bad one is left out and listed."""
    if dataset.train:
        raise InputError("eval_loader needs a data set in stored order; build it with train=False.")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if skipped is not None:
        skipped.total = max(skipped.total, len(range(rank, total, world)))
    batches = partial(evaluation_batches, total, batch_size, world, rank)
    return position_loader(dataset, batches, workers, skipped.add if skipped is not None else None, pinned)


def position_loader(
    dataset: ShardDataset,
    batches: Callable[[], Iterator[list[int]]],  # positions
    workers: int,
    on_batch: Callable[[Batch], None] | None = None,
    pinned: bool = False,  # in memory from which a GPU copies without a wait
) -> DataLoader[Batch]:
    """Batches of a data set at these positions, in this order."""
    return QuietLoader(
        dataset,
        workers=workers,
        on_batch=on_batch,
        batch_sampler=IndexBatches(batches),
        collate_fn=partial(collate, template=dataset.template),
        prefetch_factor=4 if workers else None,
        pin_memory=pinned,
    )


def collate(samples: Sequence[Batch], template: Batch) -> Batch:
    """Arrays stacked, everything else in lists, of bad samples only `skipped`; no rows as in `template` if all are."""
    good = [sample for sample in samples if "key" in sample]
    batch: Batch = {}
    for name in template:
        values = [sample[name] for sample in good or [template]]
        if isinstance(values[0], np.ndarray):
            batch[name] = torch.from_numpy(np.stack(values))
        else:
            batch[name] = torch.tensor(values, dtype=torch.int64) if name in ("position", "class_id") else values
    if not good:
        batch = {name: rows[:0] for name, rows in batch.items()}
    batch["skipped"] = [reason for sample in samples for reason in sample["skipped"]]
    return batch
