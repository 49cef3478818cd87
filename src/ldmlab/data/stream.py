"""Shards as a data set keyed by position, and the loaders over it.

The order of samples is ours (`order.py`): a batch sampler hands positions to the workers and torch's loader returns
the batches in that order, whatever the number of workers. The state of a stream is one integer, the next position.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from ldmlab.contracts import states_field
from ldmlab.data.cache import ImageCache
from ldmlab.data.decode import BAD_SAMPLE, check_fields, decode_fields, decode_image, decode_moments
from ldmlab.data.kept import KeptOrder, kept_samples
from ldmlab.data.latent_shards import read_shard_manifest
from ldmlab.data.latent_states import decode_states
from ldmlab.data.loader import QuietLoader
from ldmlab.data.manifest import check_shards
from ldmlab.data.order import Order, Place, SequentialOrder, evaluation_batches, training_batches
from ldmlab.data.parts import check_parts, decode_parts, mirrored_sample
from ldmlab.data.reader import Files, ShardReader
from ldmlab.data.wanted import Wanted, check_wanted
from ldmlab.errors import InputError
from ldmlab.image_random import image_random

TRIES = 100  # samples in a row that may be bad before the data are given up

Batch = dict[str, Any]


class ShardDataset(Dataset[Batch]):
    """The sample at any position of the stream; in training a bad one is replaced by the next good one in order."""

    def __init__(
        self, folder: Path | str, wanted: Wanted, *, seed: int = 0, train: bool = False, sha256: bool = False
    ) -> None:
        manifest = read_shard_manifest(folder)
        check_wanted(Path(folder), manifest, wanted)
        check_shards(folder, manifest, sha256)
        self.reader = ShardReader(Path(folder), manifest)
        self.wanted, self.train, self._seed = wanted, train, seed
        self.kind, self.latents = manifest.kind, manifest.latents
        red, green, blue = manifest.transform.get("background") or (255, 255, 255)
        self.background = (red, green, blue)  # laid under transparent pixels of tars made by others
        self._stored_size = manifest.picture_size
        self._kept = kept_samples(self.reader, wanted.task.keeps) if wanted.task and wanted.task.keeps else None
        self.order: Order = SequentialOrder(self.counts)
        self.put_in_order(self.order)
        self._cache: ImageCache | None = None
        self.template = self._first_sample()

    def __len__(self) -> int:
        """Images in one epoch."""
        return self.order.total

    @property
    def counts(self) -> list[int]:
        """Samples per shard that take part."""
        return self.reader.counts if self._kept is None else [len(samples) for samples in self._kept]

    def of_kept(self, values: list[str]) -> list[str]:
        """Of one value per stored sample those that take part."""
        if self._kept is None:
            return values
        return [values[self.reader.index(shard, s)] for shard, samples in enumerate(self._kept) for s in samples]

    def put_in_order(self, order: Order) -> None:
        """`order` counts the samples that take part."""
        self.order = order if self._kept is None else KeptOrder(order, self._kept)

    @cached_property
    def manifest_hash(self) -> str:
        """For checkpoints: which data a position counts in."""
        return read_shard_manifest(self.reader.folder).hash

    def keep_decoded(self, limit_gib: float) -> None:
        """Decode every image once and keep it in memory."""
        size, count = self.wanted.decoded_size or self._stored_size, sum(self.reader.counts)
        if size is None:
            raise InputError(
                f"data.cache=true with a task that crops: the images of data={self.reader.folder} differ in size; "
                "set data.cache=false, or pack them at one size."
            )
        needed = ImageCache.bytes_needed(count, size)
        if needed > limit_gib * 2**30:
            raise InputError(
                f"data.cache=true needs {needed / 2**30:.2f} GiB for {count} images, more than "
                f"data.cache_limit_gib={limit_gib:g}; raise the limit or set data.cache=false."
            )
        self._cache = ImageCache(count, size)

    def __getitem__(self, position: int) -> Batch:
        skipped: list[str] = []
        for offset in range(TRIES if self.train else 1):
            place = self.order.locate(position + offset)
            try:
                return {**self._sample(place), "position": position, "skipped": skipped}
            except BAD_SAMPLE as error:
                reason = f"{type(error).__name__}: {error}"
                skipped.append(f"{self.reader.label(place.shard, place.sample)}: {reason}")
        if self.train:
            raise InputError(f"data={self.reader.folder}: {TRIES} samples in a row cannot be read ({skipped[-1]}).")
        return {"skipped": skipped}

    def _sample(self, place: Place) -> Batch:
        """One decoded sample; `flip` picks the same side for the image, its moments and all that lies on it."""
        key, files = self.reader.read(place.shard, place.sample)
        sample: Batch = {"key": key, **decode_fields(files, self.wanted.fields)}
        flipped = self.wanted.flip and image_random(self._seed, place.epoch, key).random() < 0.5
        if self.wanted.moments:
            sample["moments"] = decode_moments(files, view=int(flipped))
        for name in self.wanted.states:
            sample[states_field(name)] = decode_states(files, name, view=int(flipped))  # (L, D)
        if self.wanted.images:
            sample["image"] = self._image(place, files)  # (3, H, W)
        sample |= decode_parts(files, self.wanted.parts - {"image"}, self.wanted.decoded_size)
        if flipped:
            sample = mirrored_sample(sample)
        if self.wanted.task:
            sample |= self.wanted.task.give(sample, image_random(self._seed, place.epoch, f"{key}#task"))
        return sample

    def _image(self, place: Place, files: Files) -> NDArray[np.uint8]:
        """The decoded image, from the cache where it was put before."""
        index = self.reader.index(place.shard, place.sample)
        image = self._cache.get(index) if self._cache else None
        if image is None:
            image = decode_image(files, self.wanted.decoded_size, self.background)
            if self._cache:
                self._cache.put(index, image)
        return image

    def _first_sample(self) -> Batch:
        """The first sample that can be read; a field that it lacks is a wrong option, not a bad sample."""
        for position in range(min(len(self), TRIES)):
            place = self.order.locate(position)
            label = self.reader.label(place.shard, place.sample)
            try:
                files = self.reader.read(place.shard, place.sample)[1]
                check_fields(label, files, self.wanted.fields)
                check_parts(label, files, self.wanted.parts - {"image"})
                return {**self._sample(place), "position": position, "skipped": []}
            except InputError:
                raise
            except BAD_SAMPLE as error:
                reason = f"{label}: {error}"
        raise InputError(f"data={self.reader.folder}: none of the first samples can be read ({reason}); pack it again.")


class IndexBatches(Sampler[list[Any]]):
    """What `make` yields, again from the beginning for every iteration of the loader."""

    def __init__(self, make: Callable[[], Iterator[list[Any]]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[list[Any]]:
        return self._make()


def train_loader(
    dataset: ShardDataset,
    *,
    micro_batch: int,  # images per forward pass of this process
    accumulate: int = 1,  # micro-batches per optimizer update
    world: int = 1,  # processes
    rank: int = 0,  # this process
    start_position: int = 0,  # images already consumed by all processes
    workers: int = 0,
) -> DataLoader[Batch]:
    """Endless micro-batches; `accumulate` of them on each of `world` processes make one global batch."""
    for name, value in (("micro_batch", micro_batch), ("accumulate", accumulate), ("world", world)):
        if value < 1:
            raise InputError(f"{name}={value} makes no batch; choose 1 or more.")
    make = partial(training_batches, micro_batch, accumulate, world, rank, start_position)
    return _loader(dataset, make, workers)


def eval_loader(
    dataset: ShardDataset,
    *,
    batch_size: int,
    world: int = 1,
    rank: int = 0,
    limit: int | None = None,  # only the first images
    workers: int = 0,
) -> DataLoader[Batch]:
    """Every image once over all processes, in stored order, never padded; a bad one is left out and listed."""
    if dataset.train:
        raise InputError("eval_loader needs a data set in stored order; build it with train=False.")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    return _loader(dataset, partial(evaluation_batches, total, batch_size, world, rank), workers)


def _loader(dataset: ShardDataset, make: Callable[[], Iterator[list[int]]], workers: int) -> DataLoader[Batch]:
    return QuietLoader(
        dataset,
        workers=workers,
        batch_sampler=IndexBatches(make),
        collate_fn=partial(collate, template=dataset.template),
        prefetch_factor=4 if workers else None,
    )


def collate(samples: Sequence[Batch], template: Batch) -> Batch:
    """Samples to a batch: arrays stacked, everything else in lists; bad samples leave nothing but `skipped`.

    Where all are bad, `template` gives the arrays' shapes and the batch has no rows.
    """
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
