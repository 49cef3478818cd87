"""The real images of an evaluation: their fields, their features, and a split of them as the reference."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.data.dataset import BatchSpec, ShardDataset
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.record import reference_record
from ldmlab.evaluation.reference_statistics import ReferenceKey, against_other_split, see_reference
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Track, numbered, untracked
from ldmlab.inference.image_files import readable, save_image
from ldmlab.inference.inputs import OPTIONAL, as_input
from ldmlab.metrics.features import FeatureExtractor

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class RealImages:
    """Both splits of the data, shared between processes."""

    data: ShardData
    extractor: FeatureExtractor
    folder: Path | None = None  # of kept reference statistics; None: none are kept
    batch_size: int = 64
    track: Track = untracked

    def count(self, split: str, limit: int | None = None) -> int:
        """Images of a split, or of its first `limit`, readable or not."""
        total = len(self.data.val_dataset("images", split))
        return min(total, limit or total)

    def batches(self, split: str, limit: int | None = None) -> Iterable[dict[str, Any]]:
        """This process's share of a split's images."""
        rank, world = distributed.rank(), distributed.world_size()
        loader = self.data.eval_loader(split, self.batch_size, world, rank, limit, kind="images")
        count = -(-self.count(split, limit) // (self.batch_size * world))
        return self.track(loader, count, f"real images ({split}), batches of {self.batch_size}")

    def numbered(self, split: str, limit: int | None = None) -> Iterable[Numbered]:
        """The same as numbers and images."""
        return numbered(self.batches(split, limit))

    def features(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) of this process's share of a split, with their images' numbers (B,)."""
        for index, images in self.numbered(split):
            yield self.extractor(images)["features"].float().cpu(), index

    def image(self, split: str, number: int) -> Fields:
        """One image with its fields."""
        sample = self.data.val_dataset("images", split)[number]
        return {**sample, "image": torch.as_tensor(sample["image"])}

    def save(self, out: Path, split: str, shown: Sequence[Fields]) -> None:
        """Write the images of the report, on the first process."""
        if distributed.rank() == 0:
            dataset = self.data.val_dataset("images", split)
            for item in shown:
                save_image(out, "real", item["number"], readable(dataset, len(dataset), item["number"]))


@dataclass
class SplitReference:
    """A split of the data as the reference of a run; `max_bad`: share of it that may be unreadable."""

    real: RealImages
    split: str
    limit: int | None = None
    max_bad: float = 0.0
    option: str = "protocol.max_bad"
    kept: bool = False  # whether kept features served; after `show_to`
    given: frozenset[str] = frozenset()  # metrics that are given statistics in place of images: none

    @property
    def count(self) -> int:
        """Images of the reference, readable or not."""
        return self.real.count(self.split, self.limit)

    def show_to(self, seen: EvaluationPass) -> None:
        """Update the metrics, from cached features if they suffice; refuses a set with too many unreadable images."""
        key = ReferenceKey.of(self.real.data, self.split, self.limit, self.real.extractor)
        images = lambda: self.real.numbered(self.split, self.limit)  # noqa: E731
        self.kept = see_reference(seen, key, self.real.folder, images, self.count)
        self.unreadable = self._unreadable(seen.total_counts()[0])

    def beside(self, seen: EvaluationPass, split: str) -> EvaluationPass:
        """A second distance of the same samples, to another split."""
        key = ReferenceKey.of(self.real.data, split, None, self.real.extractor)
        total = self.real.count(split)
        return against_other_split(seen, key, self.real.folder, lambda: self.real.numbered(split), total)

    def record(self, images: int) -> dict[str, Any]:
        """For metrics.json."""
        return reference_record(self.real.data, self.split, images) | {"kept": self.kept, "unreadable": self.unreadable}

    def marks(self) -> tuple[str, ...]:
        """Of every score."""
        if self.unreadable is None:
            return ()
        return (f"{self.count - self.unreadable['count']:,} of {self.count:,} reference images could be read",)

    def _unreadable(self, read: int) -> dict[str, Any] | None:
        """Number and names of the unreadable images; None if there are none."""
        lost = self.count - read
        if lost <= 0:
            return None
        names = sorted({name for part in distributed.gather(self.real.data.skipped(self.split).names) for name in part})
        first = f" ({names[0]})" if names else ""
        if lost > self.max_bad * self.count:
            raise InputError(
                f"{lost} of {self.count} images of {self.split} cannot be read{first}, more than {self.option}="
                f"{self.max_bad:g} of them; pack them again, or raise {self.option}."
            )
        distributed.say(f"{read:,} of {self.count:,} images of {self.split} could be read{first}")
        return {"count": lost, "of": self.count, "names": names[:20]}


def conditions(data: ShardData, split: str, fields: Sequence[str], limit: int | None = None) -> Sequence[Fields]:
    """Some fields of every readable image of a split, in stored order; a task's fields are derived on access."""
    if data.task is not None:
        return Derived(data, split, fields, limit)
    dataset = ShardDataset(data.folder(split, "images"), BatchSpec(data.image_size, images=False, fields=tuple(fields)))
    samples = (dataset[i] for i in range(min(len(dataset), limit or len(dataset))))
    return [{name: sample[name] for name in fields} for sample in samples if "key" in sample]


class _Lazy(Sequence[Fields]):
    """A sequence whose entries are computed on access."""

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
        """In the form of a model's input."""
        sample = self._dataset[self._places[index]]
        return {name: as_input(name, sample[name]) for name in self._fields if name in sample}


class Repeated(_Lazy):
    """`count` entries of a sequence, from the start again when it runs out; of each the fields named."""

    def __init__(self, entries: Sequence[Fields], names: Iterable[str], count: int) -> None:
        required = set(names)
        self._names = sorted(required | {OPTIONAL[name] for name in required & OPTIONAL.keys()})
        self._entries, self._count = entries, count

    def __len__(self) -> int:
        return self._count

    def at(self, index: int) -> Fields:
        """Entry `index` modulo their number."""
        entry = self._entries[index % len(self._entries)]
        return {name: entry[name] for name in self._names if name in entry}
