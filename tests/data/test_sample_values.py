"""Values of all samples are cached beside the manifest, and computed again when anything they depend on changes."""

import json
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from shard_maker import write_shards

from ldmlab.data.shard_data import ShardData
from ldmlab.data.shards import ShardReader
from ldmlab.tasks.layout import Layout
from scenes import write_scenes

COUNTS = [5, 4, 6]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[int, int]]:
    """How often each sample is read."""
    seen: Counter[tuple[int, int]] = Counter()
    read = ShardReader.read

    def counted(self: ShardReader, shard: int, sample: int) -> object:
        seen[shard, sample] += 1
        return read(self, shard, sample)

    monkeypatch.setattr(ShardReader, "read", counted)
    monkeypatch.setattr("ldmlab.data.dataset.TRIES", 1)  # of the checks at the start, which read some samples
    return seen


def balanced(folder: Path) -> list[tuple[int, ...]]:
    """Shard and sample at the positions of two epochs."""
    data = ShardData(str(folder), str(folder), 8, balance="category", balance_temperature=0.0, workers=0)
    order = data.train_dataset().order
    return [order.locate(position)[1:] for position in range(2 * sum(COUNTS))]


def test_a_second_start_reads_no_shard(tmp_path: Path, reads: Counter[tuple[int, int]]) -> None:
    write_shards(tmp_path, COUNTS)
    first = balanced(tmp_path)
    assert len(reads) == sum(COUNTS)
    reads.clear()
    assert balanced(tmp_path) == first
    assert set(reads) == {(0, 0)}  # the checks
    write_shards(tmp_path, COUNTS, classes=2)  # other labels, another manifest
    reads.clear()
    assert balanced(tmp_path) != first
    assert len(reads) == sum(COUNTS)
    assert len([*(tmp_path / ".cache").iterdir()]) == 1  # the old manifest's is deleted


@pytest.mark.parametrize("damage", [b"", b"{}\n", None])
def test_a_damaged_file_is_written_again(tmp_path: Path, damage: bytes | None, reads: Counter[tuple[int, int]]) -> None:
    write_shards(tmp_path, COUNTS)
    first = balanced(tmp_path)
    (kept,) = (tmp_path / ".cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:] if damage is None else damage)
    reads.clear()
    assert balanced(tmp_path) == first
    assert len(reads) == sum(COUNTS)
    assert kept.read_bytes() == whole


def test_unreadable_samples_are_tried_again(tmp_path: Path, reads: Counter[tuple[int, int]]) -> None:
    write_shards(tmp_path, COUNTS)
    tar = tmp_path / "00001.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:600] + b"\xff" + whole[601:])
    with_fault = balanced(tmp_path)
    tar.write_bytes(whole)
    reads.clear()
    healed = balanced(tmp_path)
    assert healed != with_fault
    assert set(reads) == {(0, 0), (1, 0)}
    (kept,) = (tmp_path / ".cache").iterdir()
    kept.unlink()
    assert balanced(tmp_path) == healed


def test_one_reads_while_another_waits(tmp_path: Path, reads: Counter[tuple[int, int]]) -> None:
    write_shards(tmp_path, COUNTS)
    with ThreadPoolExecutor(3) as pool:
        orders = list(pool.map(balanced, [tmp_path] * 3))
    assert orders[0] == orders[1] == orders[2]
    assert reads[2, 5] == 1


def test_beside_a_folder_without_room_they_lie_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reads: Counter[tuple[int, int]]
) -> None:
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "weights"))
    write_shards(tmp_path / "data", COUNTS)
    (tmp_path / "data" / ".cache").write_text("a file where the folder would be")
    first = balanced(tmp_path / "data")
    reads.clear()
    assert balanced(tmp_path / "data") == first
    assert len(reads) == 1
    monkeypatch.setenv("LDMLAB_WEIGHTS", str(tmp_path / "data" / "manifest.json"))
    with caplog.at_level(logging.WARNING):
        assert balanced(tmp_path / "data") == first
    assert len(reads) == sum(COUNTS)
    assert "every start reads all samples" in caplog.text


@dataclass(frozen=True)
class Odd(Layout):
    """A task of a user, whose rule stands in a file of its own."""


def test_what_a_task_keeps_is_cached(tmp_path: Path, reads: Counter[tuple[int, int]]) -> None:
    write_scenes(tmp_path, 8, (24, 16), objects=[2, 1, 3, 2, 1, 4, 2, 3])
    data = ShardData(str(tmp_path), str(tmp_path), 16, workers=0)

    def kept(task: Layout) -> int:
        reads.clear()
        return len(data.with_task(task).val_dataset())

    for number in range(2):
        assert (kept(Layout(16, least=3)), len(reads)) == (3, 1 if number else 8)
        assert (kept(Layout(16, least=4)), len(reads)) == (1, 1 if number else 8)
        assert (kept(Odd(16, least=4)), len(reads)) == (1, 1 if number else 8)
    task = Layout(16, least=3)
    object.__setattr__(task, "classes", np.int64(99))  # no plain value, so there is no key
    assert [(kept(task), len(reads)) for _ in range(2)] == [(3, 8), (3, 8)]


def test_the_file_is_a_line_of_json_and_an_int32_a_sample(tmp_path: Path, reads: Counter[tuple[int, int]]) -> None:
    write_shards(tmp_path, COUNTS)
    balanced(tmp_path)
    (kept,) = (tmp_path / ".cache").iterdir()
    head, _, data = kept.read_bytes().partition(b"\n")
    values, numbers = json.loads(head)["values"], np.frombuffer(data, "<i4")
    assert [values[number] for number in numbers] == [f"c{number % 3}" for number in range(sum(COUNTS))]
