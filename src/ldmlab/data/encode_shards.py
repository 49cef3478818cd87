"""Image shards to latent shards, one for one; any number of processes share the work and any of them may be killed.

A finished shard has a small file in `.encoded/`; whoever finds all of them writes the manifest.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldmlab.data.decode import BAD_SAMPLE, boxes_following, decode_image, reason
from ldmlab.data.fields import required_fields
from ldmlab.data.latent_shards import (
    ENCODE_PLAN,
    EncodeStates,
    FinishedShard,
    LatentShardWriter,
    Statistics,
    state_files,
)
from ldmlab.data.loaders import IndexBatches, QuietLoader
from ldmlab.data.manifest import MANIFEST, Manifest, ShardInfo, check_shards, read_manifest, write_manifest
from ldmlab.data.output_folder import open_plan
from ldmlab.data.shards import Files, ShardReader, image_ending
from ldmlab.errors import InputError
from ldmlab.files import FileLock, disk_errors, locked
from ldmlab.provenance import provenance

EncodeMoments = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) => moments float32 (B, 2C or C, h, w), on the CPU
Progress = Callable[[int, int], None]
_Image = tuple[str, NDArray[np.uint8], Files, dict[str, Any]]  # key, uint8 (3, H, W), travelling files, fields


@dataclass(frozen=True)
class LatentSettings:
    """What makes latents what they are; two folders with equal settings and source are interchangeable."""

    fingerprint: str  # hash of the first stage's weights
    latent_channels: int
    downsampling: int
    image_size: int  # px; images of another size are resized while reading
    mirrored: bool = True  # also encode the mirror image
    dtype: str = "float16"  # float16 | float32
    carries_images: bool = False  # store the image with its moments
    first_stage: dict[str, Any] | None = None  # how to build it, plain types
    states: dict[str, Any] | None = None  # by conditioner: what made the states stored with the moments, plain types

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise InputError(f"encode.dtype={self.dtype} is not a format of latents; choose float16 or float32.")
        if self.image_size % self.downsampling:
            raise InputError(
                f"data.image_size={self.image_size} is not divisible by the first stage's downsampling "
                f"{self.downsampling}; choose a multiple of it."
            )

    @property
    def read_fields(self) -> tuple[str, ...]:
        """Fields of KEY.json that the stored states are made from."""
        reads = {field for made in (self.states or {}).values() for field in made["reads"]}
        return tuple(sorted(reads - {"reference"}))  # that is the image itself


@dataclass(frozen=True)
class EncodeResult:
    """What one process did; `manifest` is None while other processes still have shards to do."""

    encoded: int  # images done now, unreadable ones too
    kept: int  # images found finished
    manifest: Manifest | None


def encode(
    source: Path | str,
    out: Path | str,
    encode_moments: EncodeMoments,
    settings: LatentSettings,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 32,
    workers: int = 0,
    max_bad: float = 0.01,  # share of unreadable images above which no manifest is written
    sha256: bool = False,  # check the shards' checksums first, not only their sizes
    progress: Progress | None = None,  # (done, total) images of this process
    encode_states: EncodeStates | None = None,  # with settings.states
    option: str = "data.train",  # name of `source` in messages
) -> EncodeResult:
    """Encode shards rank, rank + world, ... of `source`; the same call again continues where it stopped."""
    source, out = Path(source), Path(out)
    manifest = _source_manifest(source, settings, sha256, option)
    _begin(out, {"source": manifest.hash, **asdict(settings)})
    if (out / MANIFEST).exists():
        return EncodeResult(0, manifest.total, read_manifest(out))
    with locked(out / FINISHED / f"{_writer(rank)}.lock", f"OUT={out} is being encoded by another process"):
        _remove_leftovers(out, rank)
        mine = range(rank, len(manifest.shards), world)
        todo = [shard for shard in mine if finished_shard(out, manifest, shard) is None]
        batches = iter(_loader(_Images(source, manifest, settings), todo, batch_size, workers))
        work = _Work(out, settings, encode_moments, encode_states, batches, batch_size, _writer(rank))
        total = sum(manifest.shards[shard].samples for shard in mine)
        kept = done = total - sum(manifest.shards[shard].samples for shard in todo)
        for shard in todo:
            for encoded in work.encode_shard(manifest.shards[shard]):
                if progress:
                    progress(done + encoded, total)
            done += manifest.shards[shard].samples
        return EncodeResult(done - kept, kept, complete(out, manifest, settings, max_bad, rank))


def _source_manifest(source: Path, settings: LatentSettings, sha256: bool, option: str) -> Manifest:
    """Of images that carry all the fields that states are made from; InputError otherwise."""
    manifest = read_manifest(source, option)
    if manifest.kind != "images":
        raise InputError(f"{option}={source} holds {manifest.kind}, not images; give the image shards to encode.")
    if missing := sorted(set(settings.read_fields) - set(manifest.fields)):
        raise InputError(
            f"conditioner: its states are made from {missing[0]}, which {option}={source} does not carry (it has "
            f"{', '.join(manifest.fields) or 'no fields'}); leave the conditioner out, or pack the images with it."
        )
    check_shards(source, manifest, sha256)
    return manifest


@dataclass
class _Batch:
    keys: list[str]
    images: Tensor  # uint8 (B, 3, H, W)
    travelling: list[Files]
    fields: dict[str, list[Any]]  # that states are made from
    skipped: list[str]


class _Images(Dataset[Any]):
    """Decoded image and travelling files of (shard, sample); a reason where it cannot be read."""

    def __init__(self, folder: Path, manifest: Manifest, settings: LatentSettings) -> None:
        self.reader, self._settings = ShardReader(folder, manifest), settings
        self._background = manifest.background

    def __getitem__(self, place: tuple[int, int]) -> "_Image | str":
        try:
            key, files = self.reader.read(*place)
            image = decode_image(files, self._settings.image_size, self._background)
            fields = required_fields(files, self._settings.read_fields)
            if not self._settings.carries_images:
                files = boxes_following(files)
                files.pop(image_ending(files) or "")
        except BAD_SAMPLE as error:
            return f"{self.reader.label(*place)}: {reason(error)}"
        files.pop("npy", None)
        return key, image, files, fields


def _loader(images: _Images, shards: list[int], batch_size: int, workers: int) -> DataLoader[_Batch]:
    """Batches in stored order, none across two shards."""

    def places() -> Iterator[list[tuple[int, int]]]:
        for shard in shards:
            count = images.reader.counts[shard]
            for begin in range(0, count, batch_size):
                yield [(shard, sample) for sample in range(begin, min(begin + batch_size, count))]

    return QuietLoader(images, workers=workers, batch_sampler=IndexBatches(places), collate_fn=_collate)


def _collate(items: list[_Image | str]) -> _Batch:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.from_numpy(np.stack([image for _, image, _, _ in good])) if good else torch.empty(0)
    reasons = [item for item in items if isinstance(item, str)]
    fields = {name: [known[name] for _, _, _, known in good] for name in (good[0][3] if good else ())}
    return _Batch([key for key, _, _, _ in good], images, [files for _, _, files, _ in good], fields, reasons)


@dataclass(frozen=True)
class _Work:
    """The part of one process."""

    out: Path
    settings: LatentSettings
    encode_moments: EncodeMoments
    encode_states: EncodeStates | None
    batches: Iterator[_Batch]
    batch_size: int
    writer: str  # part of the names of unfinished shards

    def encode_shard(self, info: ShardInfo) -> Iterator[int]:
        """Write one latent shard and its side file; yields the images seen after every batch."""
        path, skipped = self.out / info.name, list[str]()
        try:
            with disk_errors(path):
                writer = LatentShardWriter(path, self.settings.latent_channels, self.settings.dtype, self.writer)
                try:
                    for begin in range(0, info.samples, self.batch_size):
                        batch = next(self.batches)
                        self._encode_batch(batch, writer)
                        skipped += batch.skipped
                        yield min(begin + self.batch_size, info.samples)
                    writer.finish(skipped).save(side_file(self.out, info.name))
                finally:
                    writer.abandon()
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}); run the same command again to continue.") from error

    def _encode_batch(self, batch: _Batch, writer: LatentShardWriter) -> None:
        if not batch.keys:
            return
        views = [self.encode_moments(batch.images)]
        if self.settings.mirrored:
            views.append(self.encode_moments(batch.images.flip(-1)))
        moments = torch.stack(views, dim=1).float().cpu().numpy()  # (B, views, 2C or C, h, w)
        side, channels = self.settings.image_size // self.settings.downsampling, self.settings.latent_channels
        if moments.shape[2] not in (channels, 2 * channels) or moments.shape[3] != side:
            raise ValueError(f"moments of shape {moments.shape[2:]} do not fit {self.settings}")
        states = self.encode_states(batch.images, batch.fields) if self.encode_states else {}
        for index, (key, files) in enumerate(zip(batch.keys, batch.travelling, strict=True)):
            stored = state_files(key, {name: values[index] for name, values in states.items()})
            writer.write(key, moments[index], {**files, **stored})


FINISHED = ".encoded"  # one file per finished shard
_PLAN_TEMPORARY = "encode.tmp"


def _begin(out: Path, plan: dict[str, Any]) -> None:
    """Make `out` ours, or refuse what other settings began; every process may come first."""
    ours = (FINISHED, ENCODE_PLAN)  # another process may be just as far
    strange = [path.name for path in out.iterdir() if path.name not in ours] if out.is_dir() else []
    if [name for name in strange if not name.startswith(f".{ENCODE_PLAN}.")] and not (out / ENCODE_PLAN).exists():
        raise InputError(f"OUT={out} holds something else than latents; choose a new folder.")
    with disk_errors(out):
        (out / FINISHED).mkdir(parents=True, exist_ok=True)
    with _manifest_lock(out):
        open_plan(out / ENCODE_PLAN, plan, f"OUT={out}", {"fingerprint": "latents of another first stage"})


def side_file(out: Path, name: str) -> Path:
    """What is known of the finished shard `name`."""
    return out / FINISHED / f"{name}.json"


def finished_shard(out: Path, manifest: Manifest, shard: int) -> FinishedShard | None:
    """What is known of a finished shard; None where it is still to do."""
    name = manifest.shards[shard].name
    known = FinishedShard.load(side_file(out, name))
    if known and known.info and (not (out / name).exists() or (out / name).stat().st_size != known.info.bytes):
        return None
    return known


def complete(out: Path, source: Manifest, settings: LatentSettings, max_bad: float, rank: int) -> Manifest | None:
    """Write the manifest if all shards of all processes are finished."""
    shards = [finished_shard(out, source, shard) for shard in range(len(source.shards))]
    done = [shard for shard in shards if shard is not None]
    if len(done) < len(shards):
        return None
    skipped = [reason for shard in done for reason in shard.skipped]
    if len(skipped) > max_bad * source.total:
        raise InputError(
            f"encode: {len(skipped)} of {source.total} images cannot be read ({skipped[0]}), more than the allowed "
            f"share of {max_bad:g}; repair the shards, or allow a larger share and run the same command again."
        )
    with _manifest_lock(out):
        if not (out / MANIFEST).exists():
            write_manifest(out, _manifest(source, settings, done, skipped))
            _remove_leftovers(out, rank)
    return read_manifest(out)


def _manifest(source: Manifest, settings: LatentSettings, done: list[FinishedShard], skipped: list[str]) -> Manifest:
    statistics = Statistics()
    for shard in done:
        statistics.add(shard.statistics)
    moment_channels = max(shard.moment_channels for shard in done)
    return Manifest(
        kind="latents",
        split=source.split,
        shards=[shard.info for shard in done if shard.info],
        fields=source.fields,
        image_size=source.image_size if settings.carries_images else settings.image_size,
        transform=source.transform,
        source=source.source,
        licence=source.licence,
        provenance=provenance(),
        classes=source.classes,
        latents={
            **asdict(settings),
            "has_logvar": moment_channels > settings.latent_channels,
            "statistics": statistics.summary(),
            "source_hash": source.hash,
        },
        extra={**source.extra, "skipped": skipped},
    )


def _manifest_lock(out: Path) -> AbstractContextManager[None]:
    """Held for a moment by one process at a time; the others wait."""
    return locked(out / FINISHED / "lock", f"OUT={out} is being written", wait=True, quiet=True)


def _remove_leftovers(out: Path, rank: int) -> None:
    """Delete unfinished shards of processes that have ended, this rank's earlier ones included."""
    for path in out.glob("*.tmp"):
        writer = path.name.split(".")[-2]
        lock = FileLock(out / FINISHED / f"{writer}.lock")
        if writer == _writer(rank) or lock.take():
            path.unlink(missing_ok=True)
        lock.release()


def _writer(rank: int) -> str:
    return f"rank-{rank}"
