"""The data of a run: its folders of shards, and what is read from them."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from ldmlab.contracts import Task
from ldmlab.data.batch_spec import BatchSpec
from ldmlab.data.dataset import Batch, ShardDataset
from ldmlab.data.loaders import Skipped, eval_loader, position_loader
from ldmlab.data.manifest import Manifest
from ldmlab.data.order import BalancedOrder, EpochOrder, training_batches
from ldmlab.data.shard_cache import ShardCache, shards_folder
from ldmlab.data.shards import Folder, Store, manifest_of, shards_at
from ldmlab.errors import InputError, check_side, one_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardData:
    """Image shards with a train and a held-out folder, and the latent shards made from them if there are any."""

    idle_without = "balance_temperature: balance, cache_limit_gib: cache, states: latents"
    train: str  # image shards: folder, address or pattern
    val: str  # the same, held out
    image_size: int  # px; images of another size are resized while reading
    latents: str | None = None  # folder with train/ and val/ latent shards; None: image shards are read
    flip: bool = False  # mirror half of the training images
    fields: tuple[str, ...] = ("caption",)  # of KEY.json
    mix: int = 8  # shards shuffled together
    workers: int = 2  # loader processes, at most one a processor; 0 reads in the training process
    seed: int = 0  # of the order and the flips
    cache: bool = False  # keep decoded images in memory
    cache_limit_gib: float = 2.0  # memory `cache` may take
    balance: str | None = None  # field whose classes appear at rates of their own
    balance_temperature: float = 0.5  # rate of a class ~ (its size) ^ temperature; 1 as is, 0 all equal
    object_background: tuple[int, int, int] | None = None  # colour left out of PSNR over object pixels
    sha256: bool = False  # check the shards' checksums at the start, not only their sizes
    states: bool = True  # read states stored with the latents, instead of running the encoder that made them
    shard_cache: str | None = None  # folder for shards of addresses; None: `shards_folder()`
    shard_cache_gib: float = 64.0  # how much may lie in it
    task: Task | None = None  # set by `with_task`
    stored: tuple[str, ...] = ()  # conditioners whose states are read; set by `with_states`
    classes: int | None = None  # bound of class_id: samples whose class is not below it are bad ones
    tokenizers: Mapping[str, Any] = field(default_factory=dict)  # these and `pinned`: set by `with_tokenizers`
    pinned: bool = False
    _val: dict[tuple[str, str], ShardDataset] = field(default_factory=dict, init=False, repr=False, compare=False)
    _skipped: dict[str, Skipped] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_side("data.image_size", self.image_size)
        if self.workers < 0:
            raise InputError(f"data.workers={self.workers} must be 0 or more.")
        if self.shard_cache_gib <= 0:
            raise InputError(f"data.shard_cache_gib={self.shard_cache_gib:g} must be above 0.")
        for option in ("train", "val", "latents"):
            self._at(getattr(self, option) or "", f"data.{option}")

    def with_task(self, task: Task | None) -> "ShardData":
        """The same data, from which the task derives inputs and targets."""
        return replace(self, task=task)

    def with_tokenizers(self, tokenizers: Mapping[str, Any], pinned: bool) -> "ShardData":
        """The same data with captions tokenised by the loaders, by name; pinned: in memory for a GPU."""
        used = {name: tokenizer for name, tokenizer in tokenizers.items() if name not in self.stored}
        for tokenizer in used.values():
            tokenizer([""])  # refused here, where it cannot
        return replace(self, tokenizers=used, pinned=pinned)

    def with_states(self, conditioners: Iterable[str]) -> "ShardData":
        """The same data, with the states that their latents carry for these conditioners."""
        if self.latents is None or not self.states:
            return self
        there = stored_states(self.manifest("train", "latents"))
        return replace(self, stored=tuple(name for name in conditioners if name in there))

    @property
    def kind(self) -> str:
        """What a run reads by default: latents where there are any, else images."""
        return "latents" if self.latents else "images"

    def _at(self, text: str, option: str) -> Folder:
        folder = Path(self.shard_cache) if self.shard_cache else shards_folder()
        return shards_at(text, option, ShardCache(folder, self.shard_cache_gib))

    def folder(self, split: str, kind: str | None = None) -> Folder:
        """Where the shards of a split lie; split: train | val, kind: images | latents."""
        one_of("split", split, ("train", "val"))
        if (kind or self.kind) == "images":
            return self._at(self.train if split == "train" else self.val, f"data.{split}")
        if self.latents is None:
            raise InputError(
                "data.latents is not set, but this run reads latents; give the folder `ldmlab encode` wrote."
            )
        latents = self._at(self.latents, "data.latents")
        if not isinstance(latents, Store):
            return latents / split
        if latents.names is not None:
            raise InputError(f"data.latents={latents} names shards; give the folder in which train and val lie.")
        return latents.child(split)

    def first_stage(self) -> Path:
        """The folder of the latents, where their first stage lies; of a store that is fetched."""
        latents = self._at(self.latents or "", "data.latents")
        if not isinstance(latents, Store):
            return latents
        model = latents.child("first_stage")
        model.file("first_stage.safetensors")
        return model.file("model.yaml").parent

    def manifest(self, split: str = "train", kind: str | None = None) -> Manifest:
        return manifest_of(self.folder(split, kind), self._option(split, kind or self.kind))

    def _option(self, split: str, kind: str) -> str:
        """What messages call the folder of a split."""
        return "data.latents" if kind == "latents" else f"data.{split}"

    def train_dataset(self, kind: str | None = None) -> ShardDataset:
        """The endless shuffled stream of the training split."""
        dataset = self._dataset("train", kind or self.kind, train=True)
        if self.balance is None:
            dataset.order = EpochOrder(dataset.counts, self.seed, self.mix)
        else:
            labels = dataset.labels(self.balance)
            dataset.order = order = BalancedOrder(dataset.counts, self.seed, labels, self.balance_temperature)
            logger.info("data.balance=%s: images an epoch %s", self.balance, order.draws)
        windows = 2 * self.mix if self.balance is None else len(dataset.counts)  # this one and the next
        if (needed := dataset.reader.cached_gib(windows)) > self.shard_cache_gib:
            raise InputError(
                f"data.shard_cache_gib={self.shard_cache_gib:g}: the shards that {dataset.named} is shuffled over take "
                f"{needed:.2f} GiB with those fetched ahead; raise it, or lower data.mix."
            )
        return self._cached(dataset)

    def val_dataset(self, kind: str | None = None, split: str = "val") -> ShardDataset:
        """A split in stored order, never mirrored; the same object every time, so that its cache serves them all."""
        which = split, kind or self.kind
        if which not in self._val:
            self._val[which] = self._cached(self._dataset(*which, train=False))
        return self._val[which]

    def train_loader(
        self,
        micro_batch: int,  # images per forward pass of this process
        accumulate: int = 1,  # micro-batches per optimizer update
        world: int = 1,  # processes
        rank: int = 0,  # this process
        start_position: int = 0,  # images already consumed by all processes
        kind: str | None = None,
        by_shard: bool = True,  # each process reads few shards; False: as runs did before checkpoints recorded it
    ) -> DataLoader[Batch]:
        """Endless micro-batches; `accumulate` of them on each of `world` processes make one global batch."""
        for name, value in (("micro_batch", micro_batch), ("accumulate", accumulate), ("world", world)):
            if value < 1:
                raise InputError(f"{name}={value} makes no batch; choose 1 or more.")
        dataset = self.train_dataset(kind)
        spread = dataset.order.by_shard if by_shard and world > 1 else None
        batches = partial(training_batches, micro_batch, accumulate, world, rank, start_position, spread)
        return position_loader(dataset, batches, self.workers, pinned=self.pinned)

    def eval_loader(
        self,
        split: str,
        batch_size: int,
        world: int = 1,
        rank: int = 0,
        limit: int | None = None,
        kind: str | None = None,
    ) -> DataLoader[Batch]:
        """See `loaders.eval_loader`."""
        dataset = self.val_dataset(kind, split)
        return eval_loader(dataset, batch_size, world, rank, limit, self.workers, self.skipped(split), self.pinned)

    def skipped(self, split: str) -> Skipped:
        """Images of a split that the evaluation loaders of this very object and this process could not read so far:
        "13 of 14 images" is `total - count` of `total`; a run of several processes adds up both over its ranks."""
        return self._skipped.setdefault(split, Skipped())

    def _dataset(self, split: str, kind: str, train: bool) -> ShardDataset:
        images, flip = kind == "images", self.flip and train
        task = self.task if train or self.task is None else self.task.held_out
        states = () if images else self.stored
        if states and task is not None:  # what it would derive may be stored already
            stored = stored_states(self.manifest("train", "latents"))
            known = {field for name in states for field in stored[name]["reads"]}
            task = None if task.adds and task.adds <= known else task
        fields = tuple(self.fields)
        spec = BatchSpec(self.image_size, images, not images, flip, fields, states, task, self.classes, self.tokenizers)
        folder, option = self.folder(split, kind), self._option(split, kind)
        dataset = ShardDataset(folder, spec, seed=self.seed, train=train, sha256=self.sha256, option=option)
        if dataset.split != split:
            self.check_sides(kind)
        return dataset

    def check_sides(self, kind: str) -> None:
        """InputError where the folders of the two splits were exchanged, as their manifests show."""
        try:
            found = [self.manifest(split, kind).split for split in ("train", "val")]
        except InputError:  # only one of them may be there
            return
        if found == ["val", "train"]:
            train, val = (f"{self._option(split, kind)}={self.folder(split, kind)}" for split in ("train", "val"))
            raise InputError(f"{train} holds the split val, and {val} the split train; exchange the two.")

    def _cached(self, dataset: ShardDataset) -> ShardDataset:
        if self.cache and dataset.spec.images:
            dataset.keep_decoded(self.cache_limit_gib)
        return dataset


def stored_states(manifest: Manifest) -> dict[str, Any]:
    """States stored with the moments, as the manifest records them, by conditioner."""
    return (manifest.latents or {}).get("states") or {}
