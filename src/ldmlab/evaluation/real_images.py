"""The real images of an evaluation: their fields, their features, and a split of them as the reference."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmlab import distributed
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.batch_spec import BatchSpec
from ldmlab.data.dataset import ShardDataset
from ldmlab.data.shard_data import ShardData
from ldmlab.errors import InputError
from ldmlab.evaluation.record import reference_record, save_image
from ldmlab.evaluation.reference_statistics import ReferenceKey, see_reference
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, Track, numbered, untracked
from ldmlab.inference.input_images import as_input
from ldmlab.inference.inputs import OPTIONAL
from ldmlab.metrics.frechet import FrechetDistance

Fields = Mapping[str, Any]


def count_of(data: ShardData, split: str, limit: int | None = None) -> int:
    """Images of a split, or of its first `limit`, readable or not."""
    total = len(data.val_dataset("images", split))
    return min(total, limit or total)


def batches_of(
    data: ShardData, split: str, limit: int | None, batch_size: int, track: Track, title: str
) -> Iterable[dict[str, Any]]:
    """This process's share of a split's images."""
    rank, world = distributed.rank(), distributed.world_size()
    loader = data.eval_loader(split, batch_size, world, rank, limit, kind="images")
    count = -(-count_of(data, split, limit) // (batch_size * world))
    return track(loader, count, f"{title}, batches of {batch_size}")


@dataclass(frozen=True)
class RealImages:
    """Both splits of the data, shared between processes."""

    data: ShardData
    extractor: FeatureExtractor
    folder: Path | None = None  # of kept reference statistics; None: none are kept
    batch_size: int = 64
    track: Track = untracked

    def numbered(self, split: str, limit: int | None = None) -> Iterable[Numbered]:
        """This process's share of a split's images with their numbers."""
        return numbered(batches_of(self.data, split, limit, self.batch_size, self.track, f"real images ({split})"))

    def spread(self, split: str, count: int) -> Iterator[Numbered]:
        """This process's share of `count` images at equal distances in a split, whose order may be that of classes.

        Numbers are 0 .. count - 1.
        """
        dataset = self.data.val_dataset("images", split)
        mine = range(distributed.rank(), count, distributed.world_size())
        for start in range(0, len(mine), self.batch_size):
            samples = [(one, dataset[one * len(dataset) // count]) for one in mine[start : start + self.batch_size]]
            read = {one: torch.as_tensor(sample["image"]) for one, sample in samples if "image" in sample}
            if read:
                yield torch.tensor([*read]), torch.stack([*read.values()])

    def features(self, split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (B, D) of this process's share of a split, with their images' numbers (B,)."""
        for index, images in self.numbered(split):
            yield self.extractor(images)["features"].float().cpu(), index

    def image(self, split: str, number: int) -> Fields:
        sample = self.data.val_dataset("images", split)[number]
        return {**sample, "image": torch.as_tensor(sample["image"])}

    def save(self, out: Path, split: str, shown: Sequence[Fields]) -> None:
        """Write the images of the report, on the first process; in place of an unreadable one, the next."""
        dataset = self.data.val_dataset("images", split)
        count = len(dataset)
        for item in shown if distributed.rank() == 0 else ():
            samples = (dataset[(item["number"] + step) % count] for step in range(count))
            image = next((sample["image"] for sample in samples if "image" in sample), None)
            if image is None:
                raise InputError(f"none of the {count} reference images can be read; pack them again.")
            save_image(out, "real", item["number"], torch.as_tensor(image))


@dataclass
class SplitReference:
    """A split of the data as the reference of a run; `max_bad`: share of it that may be unreadable."""

    real: RealImages
    split: str
    limit: int | None = None
    max_bad: float = 0.0
    option: str = "protocol.max_bad"
    kept: bool = False  # whether kept features served; after `show_to`

    @property
    def count(self) -> int:
        """Images of the reference, readable or not."""
        return count_of(self.real.data, self.split, self.limit)

    def given(self, seen: EvaluationPass) -> frozenset[str]:
        """No metric takes statistics in place of images."""
        return frozenset()

    def show_to(self, seen: EvaluationPass) -> None:
        """Update the metrics, from cached features if they suffice; refuses a set with too many unreadable images."""
        self.kept = self._see(seen, self.split, self.limit)
        self.unreadable = self._unreadable(seen.total_counts()[0])

    def _see(self, seen: EvaluationPass, split: str, limit: int | None) -> bool:
        real = self.real
        key = ReferenceKey.of(real.data, split, limit, real.extractor)
        total = count_of(real.data, split, limit)
        return see_reference(seen, key, real.folder, lambda: real.numbered(split, limit), total)

    def beside(self, seen: EvaluationPass, split: str) -> EvaluationPass:
        """A second Frechet distance of the same samples, to all of another split: from here on they update it too."""
        other = EvaluationPass(seen.extractor, {"fid": FrechetDistance(seen.extractor.width, small_sample=True)})
        self._see(other, split, None)
        seen.also.append(other)
        return other

    def record(self, images: int) -> dict[str, Any]:
        """For metrics.json."""
        return reference_record(self.real.data, self.split, images) | {"kept": self.kept, "unreadable": self.unreadable}

    def marks(self) -> tuple[str, ...]:
        """Of every score."""
        lost = self.unreadable["count"] if self.unreadable else 0
        return (f"{self.count - lost:,} of {self.count:,} reference images could be read",) if lost else ()

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
    return list(fields_of(data, split, fields, limit).values())


def fields_of(data: ShardData, split: str, fields: Sequence[str], limit: int | None = None) -> dict[int, Fields]:
    """Some fields of every readable image of a split by its number; no image is decoded."""
    dataset = ShardDataset(data.folder(split, "images"), BatchSpec(data.image_size, images=False, fields=tuple(fields)))
    samples = ((number, dataset[number]) for number in range(min(len(dataset), limit or len(dataset))))
    return {number: {name: one[name] for name in fields} for number, one in samples if "key" in one}


class Lazy(Sequence[Fields]):
    def __init__(self, count: int, at: Callable[[int], Fields]) -> None:
        self._count, self._at = count, at

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int | slice) -> Any:
        places = range(self._count)[index]
        return self._at(places) if isinstance(places, int) else [self._at(place) for place in places]


class Derived(Lazy):
    """A task's fields for images that can be read, as a model takes them; large ones are decoded again each time."""

    def __init__(self, data: ShardData, split: str, fields: Sequence[str], limit: int | None) -> None:
        assert data.task is not None
        derived = data.task.held_out.adds | data.task.held_out.needs
        stored = tuple(name for name in fields if name not in derived)
        self._dataset = replace(data, fields=stored).val_dataset("images", split)
        names = [*fields, *(OPTIONAL[name] for name in fields if name in OPTIONAL)]
        count = min(len(self._dataset), limit or len(self._dataset))
        self._places = [place for place in range(count) if "key" in self._dataset[place]]

        def at(index: int) -> Fields:
            sample = self.original(index)
            return {name: as_input(name, sample[name]) for name in names if name in sample}

        super().__init__(len(self._places), at)

    def original(self, index: int) -> Fields:
        """The image itself, uint8 (3, H, W), with all that the task derives, such as the mask (1, H, W)."""
        return self._dataset[self._places[index]]


def repeated(entries: Sequence[Fields], required: Iterable[str], count: int) -> Lazy:
    """`count` entries of a sequence, from the start again when it runs out; of each the fields named."""
    names = {*required}
    names |= {OPTIONAL[name] for name in names & OPTIONAL.keys()}

    def at(index: int) -> Fields:
        entry = entries[index % len(entries)]
        return {name: entry[name] for name in sorted(names) if name in entry}

    return Lazy(count, at)
