"""Shards as a data set keyed by position, and the loaders over it.

The order of samples is ours (`order.py`): a batch sampler hands positions to the workers and torch's loader returns
the batches in that order, whatever the number of workers. The state of a stream is one integer, the next position.
"""

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ldmlab.contracts import Task, states_field
from ldmlab.data.decode import (
    BAD_SAMPLE,
    check_fields,
    check_parts,
    decode_fields,
    decode_image,
    decode_moments,
    decode_parts,
    mirrored_sample,
)
from ldmlab.data.latent_shards import decode_states, read_shard_manifest
from ldmlab.data.manifest import Manifest, check_shards
from ldmlab.data.order import KeptOrder, Order, Place, SequentialOrder
from ldmlab.data.shards import Files, ShardReader, sample_fields
from ldmlab.errors import InputError
from ldmlab.image_random import image_random

TRIES = 100  # samples in a row that may be bad before the data are given up

Batch = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a batch shall hold beside key, position and skipped."""

    image_size: int  # side of the images, px; also of the images behind moments
    images: bool = True
    moments: bool = False
    flip: bool = False  # half of the images mirrored, drawn per (seed, epoch, key)
    fields: tuple[str, ...] = ("caption",)
    states: tuple[str, ...] = ()  # conditioners whose stored states come with the moments
    task: Task | None = None  # derives more from the image, its maps and its boxes

    @property
    def parts(self) -> frozenset[str]:
        """What the task starts from: image (as stored, not cropped) | mask | segmentation | boxes."""
        return self.task.needs if self.task else frozenset()

    @property
    def decoded_size(self) -> int | None:
        """Side of decoded images and maps; None: as stored, for the task to crop."""
        return None if "image" in self.parts else self.image_size


def check_wanted(folder: Path, manifest: Manifest, wanted: Wanted) -> None:
    """Refuse shards that cannot give what is wanted, before any work."""
    latents = manifest.latents or {}
    if manifest.total == 0:
        raise InputError(f"data={folder} holds no samples; pack some images first.")
    if wanted.moments and manifest.kind != "latents":
        raise InputError(
            f"data.latents={folder} holds {manifest.kind}, not latents; encode it with `ldmlab encode`, "
            "or leave data.latents=null to run the first stage while training."
        )
    if wanted.images and manifest.kind == "latents" and not latents.get("carries_images"):
        raise InputError(
            f"data={folder} holds latents without their images; give the image shards they were made from, "
            "or encode again so that images are carried."
        )
    if wanted.moments and "image" in wanted.parts:
        raise InputError(
            f"data.latents={folder} holds latents, but this task crops or changes images; set data.latents=null "
            "and give the first stage as from_run=RUN, so that it runs while training."
        )
    if wanted.moments and latents["image_size"] != wanted.image_size:
        raise InputError(
            f"data.image_size={wanted.image_size}, but the latents in {folder} were encoded at "
            f"{latents['image_size']}; use that size or encode again."
        )
    missing = sorted(set(wanted.states) - (latents.get("states") or {}).keys())
    if missing:
        raise InputError(
            f"data.latents={folder} holds no states of conditioner.{missing[0]}, unlike the training split; encode "
            "both splits alike, or set data.states=false to run the encoder while training."
        )
    if wanted.moments and wanted.flip and not latents["mirrored"]:
        raise InputError(
            f"data.flip=true, but the latents in {folder} were encoded without their mirror images; "
            "encode again with them, or set data.flip=false."
        )


class ImageCache:
    """Room for `count` uint8 images of one size, filled as they are first read.

    An anonymous map: forked workers fill and read the same pages, nothing is left on disk after a kill. A spawned
    worker cannot inherit it and fills its own.
    """

    def __init__(self, count: int, size: int) -> None:
        self._count, self._size = count, size
        self._map()

    @staticmethod
    def bytes_needed(count: int, size: int) -> int:
        """Pixels and one flag per image."""
        return count * (3 * size * size + 1)

    def _map(self) -> None:
        pixels = np.frombuffer(mmap.mmap(-1, self.bytes_needed(self._count, self._size)), np.uint8)
        self._filled = pixels[: self._count]
        self._images = pixels[self._count :].reshape(self._count, 3, self._size, self._size)

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """A copy of image `index`, (3, H, W), once it was put."""
        return self._images[index].copy() if self._filled[index] else None

    def put(self, index: int, image: NDArray[np.uint8]) -> None:
        """The flag comes after the pixels, so that another worker never reads half an image."""
        self._images[index] = image
        self._filled[index] = 1

    def __getstate__(self) -> dict[str, Any]:
        return {"_count": self._count, "_size": self._size}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()


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
