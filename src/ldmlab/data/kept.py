"""An order over the samples that take part, where a task leaves some out."""

from collections.abc import Callable, Mapping
from typing import Any

from ldmlab.data.decode import BAD_SAMPLE
from ldmlab.data.order import Order, Place
from ldmlab.data.reader import ShardReader
from ldmlab.data.tar_samples import sample_fields
from ldmlab.errors import InputError


class KeptOrder:
    """Positions to places, with an inner order that counts kept samples only."""

    def __init__(self, inner: Order, kept: list[list[int]]) -> None:
        self._inner, self._kept, self.total = inner, kept, inner.total

    def locate(self, position: int) -> Place:
        """The place of a position."""
        place = self._inner.locate(position)
        return place._replace(sample=self._kept[place.shard][place.sample])


def kept_samples(reader: ShardReader, keeps: Callable[[Mapping[str, Any]], bool]) -> list[list[int]]:
    """Per shard the samples whose KEY.json is kept, each read once; unreadable ones stay, to be counted as such."""
    kept: list[list[int]] = []
    for shard, count in enumerate(reader.counts):
        kept.append([sample for sample in range(count) if _keeps(reader, shard, sample, keeps)])
    if not any(kept):
        raise InputError(f"task: it leaves out all images of data={reader.folder}; loosen its limits.")
    return kept


def _keeps(reader: ShardReader, shard: int, sample: int, keeps: Callable[[Mapping[str, Any]], bool]) -> bool:
    try:
        return keeps(sample_fields(reader.read(shard, sample)[1]))
    except BAD_SAMPLE:
        return True
