"""The conditions of real images, one dict of fields an image, in stored order."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

from ldmlab.data.dataset import BatchSpec, ShardDataset
from ldmlab.data.shard_data import ShardData
from ldmlab.inference.inputs import OPTIONAL, as_asked

Fields = Mapping[str, Any]


def conditions(data: ShardData, split: str, fields: Sequence[str], limit: int | None = None) -> Sequence[Fields]:
    """What every image of a split says; what a task derives from it is derived when it is looked at."""
    if data.task is not None:
        return Derived(data, split, fields, limit)
    dataset = ShardDataset(data.folder(split, "images"), BatchSpec(data.image_size, images=False, fields=tuple(fields)))
    samples = (dataset[i] for i in range(min(len(dataset), limit or len(dataset))))
    return [{name: sample[name] for name in fields} for sample in samples if "key" in sample]


class _Lazy(Sequence[Fields]):
    """A sequence that is known by its entries."""

    def at(self, index: int) -> Fields:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Fields: ...

    @overload
    def __getitem__(self, index: slice) -> list[Fields]: ...

    def __getitem__(self, index: int | slice) -> Fields | list[Fields]:
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, int) else [self.at(place) for place in places]


class Derived(_Lazy):
    """A task's fields for images that can be read; large ones are decoded again each time."""

    def __init__(self, data: ShardData, split: str, fields: Sequence[str], limit: int | None) -> None:
        assert data.task is not None
        derived = data.task.held_out.adds | data.task.held_out.needs
        stored = tuple(name for name in fields if name not in derived)
        self._dataset = replace(data, fields=stored).val_dataset("images", split)
        self._fields = [*fields, *(OPTIONAL[name] for name in fields if name in OPTIONAL)]
        count = min(len(self._dataset), limit or len(self._dataset))
        self._places = [place for place in range(count) if "key" in self._dataset[place]]

    def __len__(self) -> int:
        return len(self._places)

    def original(self, index: int) -> Fields:
        """The image itself, uint8 (3, H, W), with all that the task derives, such as the mask (1, H, W)."""
        return self._dataset[self._places[index]]

    def at(self, index: int) -> Fields:
        """As a person would ask for it."""
        sample = self._dataset[self._places[index]]
        return {name: as_asked(name, sample[name]) for name in self._fields if name in sample}


class Repeated(_Lazy):
    """`count` entries of a sequence, from the start again when it runs out; of each the fields named."""

    def __init__(self, entries: Sequence[Fields], names: Iterable[str], count: int) -> None:
        told = set(names)
        self._names = sorted(told | {OPTIONAL[name] for name in told & OPTIONAL.keys()})
        self._entries, self._count = entries, count

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> Fields:
        """Entry `index` modulo their number."""
        entry = self._entries[index % len(self._entries)]
        return {name: entry[name] for name in self._names if name in entry}
