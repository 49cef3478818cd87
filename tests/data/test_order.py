"""The order of samples: exact, shuffled, the same however the work is split."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from ldmlab.data.order import (
    BalancedOrder,
    EpochOrder,
    SequentialOrder,
    evaluation_batches,
    permutation,
    shares,
    training_batches,
)
from ldmlab.errors import InputError

UNEVEN = [7, 1, 0, 30, 12, 5]


def epoch(order: EpochOrder | BalancedOrder, number: int) -> list[tuple[int, int]]:
    places = [order.locate(p) for p in range(number * order.total, (number + 1) * order.total)]
    assert {place.epoch for place in places} == {number}
    return [(place.shard, place.sample) for place in places]


def test_permutation_is_pinned() -> None:
    # raw Philox words never change with numpy; a resumed run depends on these numbers
    assert permutation(8, 0, 0, "shards").tolist() == [7, 5, 0, 4, 1, 6, 2, 3]


@pytest.mark.parametrize("mix", [1, 2, 100])
def test_every_sample_once_an_epoch(mix: int) -> None:
    order = EpochOrder(UNEVEN, seed=3, mix=mix)
    everything = sorted((shard, sample) for shard, count in enumerate(UNEVEN) for sample in range(count))
    first, second = epoch(order, 0), epoch(order, 1)
    assert sorted(first) == sorted(second) == everything
    assert first != second
    assert epoch(EpochOrder(UNEVEN, seed=4, mix=mix), 0) != first


def test_any_position_without_the_ones_before() -> None:
    straight = EpochOrder(UNEVEN, seed=3, mix=2)
    places = [straight.locate(p) for p in range(200)]
    for position in (199, 0, 54, 55, 120):
        assert EpochOrder(UNEVEN, seed=3, mix=2).locate(position) == places[position]


def test_neighbours_are_mixed_over_shards() -> None:
    order = EpochOrder([50] * 20, seed=0, mix=10)
    flat = np.array([50 * shard + sample for shard, sample in epoch(order, 0)])
    rank_correlation = np.corrcoef(flat[:-1], flat[1:])[0, 1]
    assert abs(rank_correlation) < 0.35  # two windows of half the shards each; within a window it is 0
    same_shard = np.mean(flat[:-1] // 50 == flat[1:] // 50)
    assert same_shard < 0.15  # 1/10 if the ten shards of a window are evenly mixed


def test_a_window_holds_no_more_shards_than_asked() -> None:
    order = EpochOrder([10] * 12, seed=0, mix=4)
    shards = [shard for shard, _ in epoch(order, 0)]
    assert all(len(set(shards[begin : begin + 40])) == 4 for begin in (0, 40, 80))


def test_balanced_rates_and_even_cycles() -> None:
    labels = ["people"] * 44 + ["flags"] * 10 + ["food"]
    order = BalancedOrder(UNEVEN, seed=1, labels=labels, temperature=0.5)
    weights = np.sqrt([10, 1, 44])
    assert list(order.draws.values()) == shares(weights, 55)
    seen: Counter[tuple[int, int]] = Counter()
    ends = np.cumsum(UNEVEN)
    for number in range(6):
        places = epoch(order, number)
        seen.update(places)
        flat = [int(ends[shard] - UNEVEN[shard]) + sample for shard, sample in places]
        assert Counter(labels[i] for i in flat) == order.draws
    people = [seen[place] for place in seen if int(ends[place[0]] - UNEVEN[place[0]]) + place[1] < 44]
    assert max(people) - min(people) <= 1
    assert order.locate(77) == BalancedOrder(UNEVEN, seed=1, labels=labels, temperature=0.5).locate(77)


def test_balance_limits() -> None:
    labels = ["a"] * 50 + ["b"] * 5
    assert BalancedOrder(UNEVEN, 0, labels, 1.0).draws == {"a": 50, "b": 5}
    assert BalancedOrder(UNEVEN, 0, labels, 0.0).draws == {"a": 28, "b": 27}
    with pytest.raises(InputError, match="balance_temperature=2"):
        BalancedOrder(UNEVEN, 0, labels, 2)


@pytest.mark.parametrize(("weights", "total"), [([1, 1, 1], 10), ([1e-9, 1, 1], 3), ([1, 99], 7), ([5], 5)])
def test_shares_add_up(weights: list[float], total: int) -> None:
    parts = shares(np.array(weights), total)
    assert sum(parts) == total
    assert min(parts) >= 1


@pytest.mark.parametrize(("micro", "accumulate", "world"), [(12, 1, 1), (3, 2, 2), (1, 3, 4), (4, 3, 1)])
def test_global_batches_do_not_depend_on_the_split(micro: int, accumulate: int, world: int) -> None:
    streams = [training_batches(micro, accumulate, world, rank, start=24) for rank in range(world)]
    for step in range(3):
        positions = [p for stream in streams for batch in islice(stream, accumulate) for p in batch]
        assert positions == list(range(24 + 12 * step, 24 + 12 * (step + 1)))


ORDERS = {
    "epoch": EpochOrder([100] * 23, seed=0, mix=4),
    "balanced": BalancedOrder([100] * 23, seed=0, labels=["a", "b"] * 1150, temperature=0.5),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize(("micro", "accumulate", "world"), [(3, 1, 10), (5, 2, 3), (1, 3, 10), (30, 1, 1)])
def test_the_images_of_a_step_do_not_depend_on_the_split(name: str, micro: int, accumulate: int, world: int) -> None:
    by_shard = ORDERS[name].by_shard
    streams = [training_batches(micro, accumulate, world, rank, 2290, by_shard) for rank in range(world)]
    for step in range(20):  # over the ends of windows and of the first epoch
        batches = [batch for stream in streams for batch in islice(stream, accumulate)]
        assert {len(batch) for batch in batches} == {micro}
        positions = [p for batch in batches for p in batch]
        assert sorted(positions) == list(range(2290 + 30 * step, 2290 + 30 * (step + 1)))


def _opened(by_shard: bool, mix: int, world: int) -> list[set[int]]:
    """By rank the shards it reads in the first window."""
    order = EpochOrder([1000] * 16, seed=0, mix=mix)
    streams = [training_batches(64, 1, world, r, 0, order.by_shard if by_shard else None) for r in range(world)]
    steps = 1000 * mix // (64 * world)
    return [{order.locate(p).shard for batch in islice(s, steps) for p in batch} for s in streams]


def test_each_process_reads_few_of_the_shards_of_a_window() -> None:
    before, after = _opened(False, 8, 8), _opened(True, 8, 8)
    assert all(len(shards) == 8 for shards in before)
    assert max(map(len, after)) <= 3  # its own, and a few images of the neighbours
    assert set.union(*after) == set.union(*before)
    assert sum(map(len, _opened(True, 16, 8))) < 16 * 2.5  # processes a shard, of 8, as there are two shards for each


@pytest.mark.parametrize("world", [1, 2, 5])
def test_evaluation_covers_all_once(world: int) -> None:
    positions = [p for rank in range(world) for batch in evaluation_batches(13, 4, world, rank) for p in batch]
    assert sorted(positions) == list(range(13))
    assert [SequentialOrder([3, 0, 10]).locate(p)[1:] for p in (0, 2, 3, 12)] == [(0, 0), (0, 2), (2, 0), (2, 9)]
