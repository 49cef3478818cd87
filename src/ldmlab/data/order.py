"""Which sample is at which position of the endless training stream: a pure function of (seed, epoch, manifest).

The stream is one epoch after another; position p counts images consumed by all processes together, so which images a
step has never depends on how the work is split. Which process reads which of them does: each takes those of few shards.
Raw Philox words sorted stably give the permutations: that stream is fixed by its paper, while numpy may change how its
own shuffles draw.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ldmlab.errors import InputError


class Place(NamedTuple):
    """Where the sample of a position lies."""

    epoch: int
    shard: int
    sample: int


def permutation(count: int, *key: object) -> NDArray[np.int64]:
    """A permutation of 0 .. count - 1 that depends on `key` alone."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(digest, "<u8")).random_raw(count)
    return np.argsort(words, kind="stable")


class SequentialOrder:
    """Shards and samples as they are stored; `total` positions make one epoch. For evaluation and encoding."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.total, self._ends = int(sum(counts)), np.cumsum(counts)

    def locate(self, position: int) -> Place:
        """The place of a position; after the last sample the next epoch starts."""
        epoch, offset = divmod(position, self.total)
        return Place(epoch, *split_index(self._ends, self._stored(epoch, offset)))

    def by_shard(self, first: int, count: int) -> list[int]:
        """Positions first .. first + count - 1, those of one shard next to each other."""
        stored = [self._stored(*divmod(position, self.total)) for position in range(first, first + count)]
        return (first + np.argsort(np.searchsorted(self._ends, stored, "right"), kind="stable")).tolist()

    def ahead(self, position: int) -> Sequence[int]:
        """Shards that this position and those after it read, the next ones first."""
        first = self.locate(position).shard
        return range(first, min(first + 3, len(self._ends)))

    def _stored(self, epoch: int, offset: int) -> int:
        """Which sample of all, as stored, is at an offset of an epoch."""
        return offset


class EpochOrder(SequentialOrder):
    """Every sample once an epoch: shards in random order, samples shuffled within windows of `mix` shards."""

    def __init__(self, counts: Sequence[int], seed: int, mix: int) -> None:
        if mix < 1:
            raise InputError(f"data.mix={mix} shards cannot be shuffled together; choose 1 or more.")
        super().__init__(counts)
        self._counts, self._seed, self._mix = np.asarray(counts, np.int64), seed, mix
        self._epoch, self._window = -1, (-1, -1)  # those that were used last and are kept

    def locate(self, position: int) -> Place:
        """The place of a position."""
        place = self._enter(position)
        shard, sample = split_index(self._mixed_ends, int(self._samples[place]))
        return Place(self._epoch, int(self._mixed[shard]), sample)

    def by_shard(self, first: int, count: int) -> list[int]:
        """As above, in the order in which the stream comes to the shards."""
        keys, done, shards = np.empty(count, np.int64), 0, 0
        while done < count:  # once a window
            place = self._enter(first + done)
            here = self._samples[place : place + count - done]
            keys[done : done + len(here)] = shards + np.searchsorted(self._mixed_ends, here, "right")
            done, shards = done + len(here), shards + self._mix
        return (first + np.argsort(keys, kind="stable")).tolist()

    def _enter(self, position: int) -> int:
        """Take up the window of a position; its offset there."""
        epoch, offset = divmod(position, self.total)
        if epoch != self._epoch:
            self._shards = permutation(len(self._counts), self._seed, epoch, "shards")
            starts = np.arange(0, len(self._shards), self._mix)
            self._window_ends = np.cumsum(np.add.reduceat(self._counts[self._shards], starts))
            self._epoch = epoch
        window, place = split_index(self._window_ends, offset)
        if (epoch, window) != self._window:
            self._mixed = self._shards[window * self._mix : (window + 1) * self._mix]
            self._mixed_ends = np.cumsum(self._counts[self._mixed])
            self._samples = permutation(int(self._mixed_ends[-1]), self._seed, epoch, "samples", window)
            self._window = epoch, window
        return place

    def ahead(self, position: int) -> Sequence[int]:
        """The shards of the position's window, and of the next one."""
        self._enter(position)
        epoch, window = self._window
        following = self._shards[(window + 1) * self._mix : (window + 2) * self._mix]
        if len(following) == 0:
            following = permutation(len(self._counts), self._seed, epoch + 1, "shards")[: self._mix]
        return (*self._mixed.tolist(), *following.tolist())


class BalancedOrder(SequentialOrder):
    """Classes at chosen rates: class c fills a fixed number of an epoch's N places, ~ n_c^temperature.

    Each class runs through its own samples in shuffled cycles that continue over epochs, so within a class no sample is
    ever more than one draw ahead of another. Temperature 1 keeps the rates of the data, 0 makes all classes equal.
    labels: the class of each sample, a sequence or an array of texts.
    """

    def __init__(self, counts: Sequence[int], seed: int, labels: Any, temperature: float) -> None:
        if not 0 <= temperature <= 1:
            raise InputError(f"data.balance_temperature={temperature} is outside 0 (equal) .. 1 (as the data are).")
        super().__init__(counts)
        self._seed, self._epoch = seed, -1
        names, classes = np.unique(np.asarray(labels), return_inverse=True)
        self._members = [np.flatnonzero(classes == c) for c in range(len(names))]
        sizes = np.array([len(m) for m in self._members], np.float64)
        self.draws = dict(zip(names.tolist(), shares(sizes**temperature, self.total), strict=True))

    def ahead(self, position: int) -> Sequence[int]:
        """All: classes are spread over them."""
        return range(len(self._ends))

    def _stored(self, epoch: int, offset: int) -> int:
        if epoch != self._epoch:
            self._epoch, self._samples = epoch, self._draw(epoch)
        return int(self._samples[offset])

    def _draw(self, epoch: int) -> NDArray[np.int64]:
        """The samples of an epoch, as indices over all shards, in order."""
        chosen = []
        for c, (members, draws) in enumerate(zip(self._members, self.draws.values(), strict=True)):
            first, size = epoch * draws, len(members)
            cycles = range(first // size, (first + draws - 1) // size + 1)
            stream = np.concatenate([members[permutation(size, self._seed, cycle, "class", c)] for cycle in cycles])
            chosen.append(stream[first % size :][:draws])
        return np.concatenate(chosen)[permutation(self.total, self._seed, epoch, "balanced")]


def shares(weights: NDArray[np.float64], total: int) -> list[int]:
    """`total` split proportionally to `weights` into whole numbers of at least one, by largest remainders."""
    exact = weights / weights.sum() * total
    whole = np.maximum(np.floor(exact).astype(np.int64), 1)
    while (gap := total - int(whole.sum())) != 0:  # at most one round up, and one down for classes lifted to one
        order = np.argsort(whole - exact if gap > 0 else exact - whole, kind="stable")
        order = order if gap > 0 else order[whole[order] > 1]
        whole[order[: abs(gap)]] += 1 if gap > 0 else -1
    return [int(n) for n in whole]


def split_index(ends: NDArray[np.int64], index: int) -> tuple[int, int]:
    """Which segment holds `index`, and where in it, for segments that end at `ends`."""
    segment = int(np.searchsorted(ends, index, side="right"))
    return segment, index - (int(ends[segment - 1]) if segment else 0)


def training_batches(
    micro_batch: int,
    accumulate: int,
    world: int,
    rank: int,
    start: int,
    by_shard: Callable[[int, int], list[int]] | None = None,  # of an order
) -> Iterator[list[int]]:
    """Positions of this process's micro-batches, for ever.

    Global batch k is positions start + k G .. start + (k + 1) G - 1 with G = micro_batch * accumulate * world; each
    rank takes a contiguous slice of it, or of the same positions sorted by shard, and splits that into micro-batches.
    A shard's part of a step is about the same through its window, so a rank stays with its shards from step to step.
    """
    share = micro_batch * accumulate
    mine = slice(rank * share, (rank + 1) * share)
    while True:
        step = range(start, start + share * world)
        positions = by_shard(start, len(step))[mine] if by_shard else step[mine]
        for begin in range(0, share, micro_batch):
            yield list(positions[begin : begin + micro_batch])
        start += len(step)


def evaluation_batches(total: int, batch_size: int, world: int, rank: int) -> Iterator[list[int]]:
    """Positions rank, rank + world, ... below `total`, each once over all ranks; nothing is padded."""
    mine = range(rank, total, world)
    for begin in range(0, len(mine), batch_size):
        yield list(mine[begin : begin + batch_size])


def image_random(seed: int, epoch: int, key: str) -> random.Random:
    """The generator for an image's crops and flips in a loader worker: a function of (seed, epoch, key)."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{key}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))
