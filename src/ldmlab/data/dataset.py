"""Shards as a data set keyed by position, in the order that `order.py` gives them."""

import mmap
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from ldmlab.annotations import BOXES
from ldmlab.contracts import Task
from ldmlab.data.batch_spec import BatchSpec, check_spec
from ldmlab.data.decode import BAD_SAMPLE, decode_image, decode_moments, decode_states, required_fields, sample_fields
from ldmlab.data.image_parts import decode_parts, mirrored_sample, missing_part
from ldmlab.data.order import Place, SequentialOrder, image_random
from ldmlab.data.sample_values import field_value, kept_by, sample_values
from ldmlab.data.shard_cache import Ahead
from ldmlab.data.shards import Folder, ShardLost, ShardReader, check_there, manifest_of
from ldmlab.data.tars import Files
from ldmlab.errors import InputError
from ldmlab.stored_names import CUT_PREFIX, IDS_PREFIX, STATES_PREFIX

TRIES = 100  # samples in a row that may be bad before the data are given up, and samples checked at the start
Batch = dict[str, Any]


class ImageCache:
    """Room for `count` uint8 images of one size, filled as they are first read: an anonymous map, whose pages forked
    workers share and of which a kill leaves nothing on disk. A spawned worker fills its own."""

    def __init__(self, count: int, size: int, limit_gib: float) -> None:
        needed = count * (3 * size * size + 1)  # pixels and one flag per image
        if needed > limit_gib * 2**30:
            raise InputError(
                f"data.cache=true needs {needed / 2**30:.2f} GiB for {count} images, more than "
                f"data.cache_limit_gib={limit_gib:g}; raise the limit or set data.cache=false."
            )
        self._made_with = count, size, limit_gib
        pixels = np.frombuffer(mmap.mmap(-1, needed), np.uint8)
        self._filled, self._images = pixels[:count], pixels[count:].reshape(count, 3, size, size)

    def get(self, index: int) -> NDArray[np.uint8] | None:
        """A copy of image `index`, (3, H, W), once it was put."""
        return self._images[index].copy() if self._filled[index] else None

    def put(self, index: int, image: NDArray[np.uint8]) -> None:
        """The flag comes after the pixels, so that another worker never reads half an image."""
        self._images[index] = image
        self._filled[index] = 1

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, self._made_with


class ShardDataset(Dataset[Batch]):
    """The sample at any position of the stream; in training a bad one is replaced by the next good one in order."""

    def __init__(
        self,
        folder: Folder,
        spec: BatchSpec,
        *,
        seed: int = 0,
        train: bool = False,
        sha256: bool = False,
        option: str = "data",  # its name in messages
    ) -> None:
        manifest = manifest_of(folder, option)
        self.named = f"{option}={folder}"
        check_spec(self.named, manifest, spec)
        check_there(folder, manifest, sha256)
        self.reader = ShardReader(folder, manifest)
        self._ahead: Ahead | None = None  # of a loader process
        self.spec, self.train, self._seed = spec, train, seed
        self._background, self._stored_size = manifest.background, manifest.image_size
        named_classes = len(manifest.classes) if manifest.classes and BOXES not in manifest.fields else None
        self._classes = spec.classes or named_classes
        self._moment_shape: tuple[int, int, int] | None = None  # of one view, (2C or C, h, w)
        if spec.moments and (latents := manifest.latents):
            side = latents["image_size"] // latents["downsampling"]
            self._moment_shape = latents["latent_channels"] * (2 if latents["has_logvar"] else 1), side, side
        self._hash, self._remedy, self.split = manifest.hash, manifest.remedy, manifest.split
        self._state_shapes = dict[str, tuple[int, ...]]()  # by conditioner
        self._kept: list[NDArray[np.int64]] | None = None  # per shard the samples that take part; None: all
        if spec.task and (keeps := spec.task.keeps):
            self._kept = self._kept_samples(spec.task, keeps)
        self.order = SequentialOrder(self.counts)  # of the samples that take part; the caller may set another
        self._cache: ImageCache | None = None
        self._check_samples(manifest.fields if manifest.kind == "images" else None)
        self.template = self._first_sample()

    def __len__(self) -> int:
        """Images in one epoch."""
        return self.order.total

    @property
    def counts(self) -> list[int]:
        """Samples per shard that take part."""
        return self.reader.counts if self._kept is None else [len(samples) for samples in self._kept]

    def labels(self, field: str) -> NDArray[Any]:
        """The value of `field` as text for every sample that takes part; "" where it is missing or unreadable."""
        found = sample_values(self.reader, self._hash, field_value(field), self.named)
        if self._kept is not None:
            found = found._replace(numbers=found.numbers[self._keeps])
        lacks = [number for number, value in enumerate(found.values) if value is None]
        if lacks and 2 * np.count_nonzero(lacking := found.numbers == lacks[0]) > len(lacking):
            place = self._place(int(lacking.argmax()))
            known = sample_fields(self.reader.read(place.shard, place.sample)[1])
            raise InputError(
                f"data.balance={field}: {np.count_nonzero(lacking)} of {len(lacking)} samples lack it: sample "
                f"{self.reader.label(place.shard, place.sample)} has no such field (it has "
                f"{', '.join(sorted(known))}); name another."
            )
        return found.texts()

    def keep_decoded(self, limit_gib: float) -> None:
        """Decode every image once and keep it in memory."""
        size, count = self.spec.decoded_size or self._stored_size, sum(self.reader.counts)
        if size is None:
            raise InputError(
                f"data.cache=true with a task that crops: the images of {self.named} differ in size; "
                "set data.cache=false, or pack them at one size."
            )
        self._cache = ImageCache(count, size, limit_gib)

    def __getitem__(self, position: int) -> Batch:
        if self.reader.store and (worker := get_worker_info()):
            self._ahead = self._ahead or Ahead(self.reader.fetch_ahead, worker.id)
            self._ahead.want(self.order.ahead(position))
        skipped: list[str] = []
        for offset in range(TRIES if self.train else 1):
            if sample := self._tried(position + offset, skipped):
                return {**sample, "position": position, "skipped": skipped}
        if self.train:
            raise InputError(f"{self.named}: {TRIES} samples in a row cannot be read ({skipped[-1]}); {self._remedy}.")
        return {"skipped": skipped}

    def _tried(self, position: int, skipped: list[str]) -> Batch | None:
        """The sample at a position; None, and why in `skipped`, where it cannot be read."""
        place = self._place(position)
        try:
            return self._sample(place)
        except ShardLost:
            raise
        except BAD_SAMPLE as error:
            skipped.append(self.reader.fault(place.shard, place.sample, error))
            return None

    def _place(self, position: int) -> Place:
        place = self.order.locate(position)
        return place._replace(sample=int(self._kept[place.shard][place.sample])) if self._kept else place

    def _sample(self, place: Place) -> Batch:
        """One decoded sample; `flip` picks the same side for the image, its moments and all that lies on it."""
        key, files = self.reader.read(place.shard, place.sample)
        sample: Batch = {"key": key, **required_fields(files, self.spec.fields, self._classes)}
        flipped = self.spec.flip and image_random(self._seed, place.epoch, key).random() < 0.5
        if self.spec.moments:
            sample["moments"] = decode_moments(files, int(flipped), self._moment_shape)
        for name in self.spec.states:
            sample[STATES_PREFIX + name] = decode_states(files, name, int(flipped), self._state_shapes)  # (L, D)
        if self.spec.images:
            sample["image"] = self._image(place, files)  # (3, H, W)
        if self.spec.parts:
            sample |= decode_parts(files, self.spec.parts - {"image"}, self.spec.decoded_size)
        if flipped and (self.spec.parts or self.spec.images):
            sample = mirrored_sample(sample)
        if self.spec.task:
            sample |= self.spec.task.give(sample, image_random(self._seed, place.epoch, f"{key}#task"))
        for name, tokenizer in self.spec.tokenizers.items():
            sample[IDS_PREFIX + name] = tokenizer([sample["caption"]])[0].numpy()  # (L,)
            sample[CUT_PREFIX + name] = bool(tokenizer.lost(sample["caption"]))
        return sample

    def _image(self, place: Place, files: Files) -> NDArray[np.uint8]:
        """The decoded image, from the cache where it was put before."""
        if self._cache is None:
            return decode_image(files, self.spec.decoded_size, self._background)
        index = self.reader.index(place.shard, place.sample)
        if (image := self._cache.get(index)) is None:
            image = decode_image(files, self.spec.decoded_size, self._background)
            self._cache.put(index, image)
        return image

    def _check_samples(self, listed: Collection[str] | None) -> None:
        """Refuse fields and parts that most of TRIES readable samples lack: a wrong option, not bad samples.

        `listed`: the fields of the manifest, which are those of all samples; None of latents, which may have more.
        """
        total = (self.reader.store and self.counts[0]) or len(self)  # of a store the first shard: others are far away
        count = min(total, TRIES)
        readable, lacks = 0, {kind: dict[str, str]() for kind in ("fields", "listed", "parts")}  # kind, sample => what
        for position in (number * total // count for number in range(count)):
            place = self._place(position)
            label = self.reader.label(place.shard, place.sample)
            try:
                files = self.reader.read(place.shard, place.sample)[1]
                if missing := missing_part(files, self.spec.parts - {"image"}):
                    lacks["parts"][label] = f"{missing[0]}, but sample {label} has no {missing[1]}"
                readable += 1
            except ShardLost:
                raise
            except BAD_SAMPLE:
                continue
            try:
                required_fields(files, self.spec.fields, self._classes)
                if listed is not None and (more := sample_fields(files).keys() - listed):
                    lacks["listed"][label] = f"{min(more)!r:.80}"
            except ValueError as error:
                lacks["fields"][label] = str(error)
        for kind, found in lacks.items():
            if 2 * len(found) > readable:
                label, what = next(iter(found.items()))
                raise InputError(self._lacking(kind, label, what, f"{len(found)} of {readable}"))

    def _lacking(self, kind: str, label: str, what: str, share: str) -> str:
        """The sentence of what most samples lack, such as this one."""
        if kind == "fields":
            return (
                f"data.fields={list(self.spec.fields)}: {share} samples of {self.named} have none that can be used: "
                f"sample {label} has {what}; name fields the data carry, or pack them with `ldmlab pack`."
            )
        if kind == "listed":
            return (
                f"{self.named}: its manifest.json does not list the field {what}, which sample {label} has; pack or "
                "index the folder again."
            )
        return (
            f"task: it starts from {what}, nor have {share} that were read; add it to the shards, or choose another "
            "task."
        )

    def _first_sample(self) -> Batch:
        """The first sample that can be read: the form of batches in which none can."""
        skipped = list[str]()
        for position in range(min(len(self), TRIES)):
            if sample := self._tried(position, skipped):
                return {**sample, "position": position, "skipped": []}
        raise InputError(f"{self.named}: none of the first samples can be read ({skipped[-1]}); {self._remedy}.")

    def _kept_samples(self, task: Task, keeps: Callable[[Mapping[str, Any]], bool]) -> list[NDArray[np.int64]]:
        """Per shard the samples whose KEY.json is kept; unreadable ones stay, to be counted as such."""
        found = sample_values(self.reader, self._hash, kept_by(task, keeps, (BOXES,)), self.named)
        self._keeps = np.array([*(value == "yes" for value in found.values), True])[found.numbers]
        if not self._keeps.any():
            raise InputError(f"task: it leaves out all images of {self.named}; loosen its limits.")
        return [np.flatnonzero(part) for part in np.split(self._keeps, self.reader.ends[:-1])]
