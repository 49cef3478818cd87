"""The random state of a process as tensors and plain types, so that a resumed run gets the same random numbers."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from ldmlab import distributed


def random_state() -> dict[str, Any]:
    """States of torch (each device), numpy and Python."""
    version, words, gauss = random.getstate()
    name, numpy_words, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.asarray(numpy_words, dtype=np.int64)), place, has_gauss, cached],
        "python": [version, list(words), gauss],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`; states of devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, words, place, has_gauss, cached = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), place, has_gauss, cached))  # noqa: NPY002
    version, python_words, gauss = state["python"]
    random.setstate((version, tuple(python_words), gauss))


def seed_process(seed: int, rank: int) -> None:
    """Different streams for each process: network dropout must not repeat itself over processes."""
    mixed = (seed * 1_000_003 + rank) % 2**32
    torch.manual_seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002
    random.seed(mixed)


@contextmanager
def isolated_random(seed: int) -> Iterator[None]:
    """Inside, random numbers start at `seed`; afterwards the previous state of all streams is restored."""
    before = random_state()
    seed_process(seed, 0)
    try:
        yield
    finally:
        restore_random_state(before)


class RandomState(pl.Callback):
    """The random state of every process in checkpoints, taken up once the first batch is loaded.

    From there on only the networks use random numbers.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] = []
        self._begun = False

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """States of all processes; of no use with another number of them."""
        self._states = checkpoint["rng"]

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Once, before the first step."""
        if self._begun:
            return
        self._begun = True
        if len(self._states) == distributed.world_size():
            restore_random_state(self._states[distributed.rank()])
        else:  # a new run, or one resumed with another number of processes
            seed_process(pl_module.seed + pl_module.step, distributed.rank())
        self._states = []

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A collective call."""
        checkpoint["rng"] = distributed.gather(random_state())
