"""Image shards to latent shards, one for one; any number of processes share the work and any of them may be killed.

A finished shard has a small file in `.encoded/`; whoever finds all of them writes the manifest.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldmlab.data.decode import BAD_SAMPLE, decode_image, required_fields
from ldmlab.data.image_parts import boxes_following
from ldmlab.data.latent_shards import EncodeStates, FinishedShard, Statistics, npy_bytes, state_files
from ldmlab.data.loaders import IndexBatches, QuietLoader
from ldmlab.data.manifest import ENCODE_PLAN, MANIFEST, Manifest, read_complete, statistics_digest, write_manifest
from ldmlab.data.output_folder import ShardFile, finished_shard, open_plan
from ldmlab.data.shard_info import ShardInfo
from ldmlab.data.shards import Folder, ShardLost, ShardReader, check_there, manifest_of
from ldmlab.data.tars import Files, image_ending, tar_bytes
from ldmlab.disks import FileLock, disk_errors, locked
from ldmlab.errors import InputError
from ldmlab.files import clear_unfinished, write_json
from ldmlab.provenance import provenance

EncodeMoments = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) => moments float32 (B, 2C or C, h, w), on the CPU
Progress = Callable[[int, int], None]
_Sample = tuple[str, Files, dict[str, Any]]  # key, travelling files, fields that states are made from
_Batch = tuple[Tensor, list[_Sample], list[str]]  # uint8 (B, 3, H, W), its samples, reasons of unreadable ones
FINISHED = ".encoded"  # one file per finished shard


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
    precision: str = "float32"  # of the first stage: float32 | bfloat16

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise InputError(f"encode.dtype={self.dtype} is not a format of latents; choose float16 or float32.")
        if self.image_size % self.downsampling:
            raise InputError(
                f"data.image_size={self.image_size} is not divisible by the first stage's downsampling "
                f"{self.downsampling}; choose a multiple of it."
            )

    def record(self) -> dict[str, Any]:
        """For the manifest; precision only where it is not that of older latents."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("precision", "float32")}

    @property
    def read_fields(self) -> tuple[str, ...]:
        """Fields of KEY.json that the stored states are made from."""
        reads = {field for made in (self.states or {}).values() for field in made["reads"]}
        return tuple(sorted(reads - {"reference", "image"}))  # these are the image itself


def encode(
    source: Folder | str,
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
) -> Manifest | None:
    """Encode shards rank, rank + world, ... of `source`; the same call again continues where it stopped.

    The manifest of all; None while other processes still have shards to do.
    """
    source, out = Path(source) if isinstance(source, str) else source, Path(out)
    manifest = _source_manifest(source, settings, sha256, option)
    _begin(out, {"source": manifest.hash, **settings.record()})
    if (out / MANIFEST).exists():
        return read_complete(out, sha256)
    work = _Work(out, manifest, settings, encode_moments, encode_states, batch_size, f"rank-{rank}")
    with locked(out / FINISHED / f"{work.writer}.lock", f"OUT={out} is being encoded by another process"):
        work.remove_leftovers()
        mine = {shard: manifest.shards[shard] for shard in range(rank, len(manifest.shards), world)}
        todo = {shard: info for shard, info in mine.items() if work.finished(info) is None}
        batches = iter(_loader(_Images(source, manifest, settings), todo, batch_size, workers))
        total = sum(info.samples for info in mine.values())
        done = total - sum(info.samples for info in todo.values())
        for info in todo.values():
            for encoded in work.encode_shard(info, batches):
                if progress:
                    progress(done + encoded, total)
            done += info.samples
        return work.complete(max_bad)


def _source_manifest(source: Folder, settings: LatentSettings, sha256: bool, option: str) -> Manifest:
    """Of images that carry all the fields that states are made from; InputError otherwise."""
    manifest = manifest_of(source, option)
    if manifest.kind != "images":
        raise InputError(f"{option}={source} holds {manifest.kind}, not images; give the image shards to encode.")
    if missing := sorted(set(settings.read_fields) - set(manifest.fields)):
        raise InputError(
            f"conditioner: its states are made from {missing[0]}, which {option}={source} does not carry (it has "
            f"{', '.join(manifest.fields) or 'no fields'}); leave the conditioner out, or pack the images with it."
        )
    check_there(source, manifest, sha256)
    return manifest


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


def _manifest_lock(out: Path) -> AbstractContextManager[None]:
    """Held for a moment by one process at a time; the others wait."""
    return locked(out / FINISHED / "lock", f"OUT={out} is being written", wait=True, quiet=True)


class _Images(Dataset[Any]):
    """Decoded image, uint8 (3, H, W), and sample at (shard, number); a reason where it cannot be read."""

    def __init__(self, folder: Folder, manifest: Manifest, settings: LatentSettings) -> None:
        self.reader, self._settings = ShardReader(folder, manifest), settings
        self._background = manifest.background

    def __getitem__(self, place: tuple[int, int]) -> tuple[NDArray[np.uint8], _Sample] | str:
        try:
            key, files = self.reader.read(*place)
            image = decode_image(files, self._settings.image_size, self._background)
            fields = required_fields(files, self._settings.read_fields)
            if not self._settings.carries_images:
                files = boxes_following(files)
                files.pop(image_ending(files) or "")
        except ShardLost:
            raise
        except BAD_SAMPLE as error:
            return self.reader.fault(*place, error)
        files.pop("npy", None)
        return image, (key, files, fields)


def _loader(images: _Images, shards: Mapping[int, ShardInfo], batch_size: int, workers: int) -> DataLoader[_Batch]:
    """Batches in stored order, none across two shards."""

    def places() -> Iterator[list[tuple[int, int]]]:
        for shard, info in shards.items():
            for begin in range(0, info.samples, batch_size):
                yield [(shard, sample) for sample in range(begin, min(begin + batch_size, info.samples))]

    return QuietLoader(images, workers=workers, batch_sampler=IndexBatches(places), collate_fn=_collate)


def _collate(items: list[tuple[NDArray[np.uint8], _Sample] | str]) -> _Batch:
    good = [item for item in items if not isinstance(item, str)]
    images = torch.from_numpy(np.stack([image for image, _ in good])) if good else torch.empty(0)
    return images, [sample for _, sample in good], [item for item in items if isinstance(item, str)]


@dataclass(frozen=True)
class _Work:
    """The part of one process."""

    out: Path
    source: Manifest
    settings: LatentSettings
    encode_moments: EncodeMoments
    encode_states: EncodeStates | None
    batch_size: int
    writer: str  # part of the names of unfinished shards

    def encode_shard(self, info: ShardInfo, batches: Iterator[_Batch]) -> Iterator[int]:
        """Write one latent shard and its side file; yields the images seen after every batch."""
        path, skipped, statistics, channels = self.out / info.name, list[str](), Statistics(), 0
        try:
            with disk_errors(path):
                file = ShardFile(path, self.writer)
                try:
                    for begin in range(0, info.samples, self.batch_size):
                        images, samples, reasons = next(batches)
                        skipped += reasons
                        if samples:
                            channels = self._encode_batch(images, samples, file, statistics)
                        yield min(begin + self.batch_size, info.samples)
                    finished = FinishedShard(file.finish(), statistics, channels, skipped)
                    side = {**vars(finished), "info": finished.info.plain if finished.info else None}
                    write_json(self._side_file(info), side | {"statistics": asdict(statistics)})
                finally:
                    file.abandon()
        except OSError as error:
            raise InputError(f"{path} cannot be written ({error}); run the same command again to continue.") from error

    def _encode_batch(self, images: Tensor, samples: list[_Sample], file: ShardFile, statistics: Statistics) -> int:
        """Append the samples to the shard; how many channels their moments have, 2C or C."""
        views = [self.encode_moments(images)]
        if self.settings.mirrored:
            views.append(self.encode_moments(images.flip(-1)))
        moments = torch.stack(views, dim=1).float().cpu().numpy()  # (B, views, 2C or C, h, w)
        side, channels = self.settings.image_size // self.settings.downsampling, self.settings.latent_channels
        if moments.shape[2] not in (channels, 2 * channels) or moments.shape[3] != side:
            raise ValueError(f"moments of shape {moments.shape[2:]} do not fit {self.settings}")
        fields = {name: [known[name] for _, _, known in samples] for name in samples[0][2]}
        states = self.encode_states(images, fields) if self.encode_states else {}
        instead = "use dtype=float32, or a first stage with finite latents"
        for index, (key, files, _) in enumerate(samples):
            stored = state_files(key, {name: values[index] for name, values in states.items()})
            npy = npy_bytes(f"moments of {key}", moments[index], self.settings.dtype, instead)
            files = {**files, **stored, "npy": npy}
            statistics.add_moments(moments[index], channels)
            file.append(b"".join(tar_bytes(f"{key}.{ending}", files[ending]) for ending in sorted(files)))
        return moments.shape[2]

    def _side_file(self, info: ShardInfo) -> Path:
        return self.out / FINISHED / f"{info.name}.json"

    def finished(self, info: ShardInfo) -> FinishedShard | None:
        """What is known of a finished shard; None where it is still to do."""

        def take(side: dict[str, Any]) -> FinishedShard:
            return FinishedShard(**{**side, "statistics": Statistics(**side["statistics"])})

        return finished_shard(self._side_file(info), self.out / info.name, take)

    def complete(self, max_bad: float) -> Manifest | None:
        """Write the manifest if all shards of all processes are finished."""
        done = [finished for info in self.source.shards if (finished := self.finished(info)) is not None]
        if len(done) < len(self.source.shards):
            return None
        skipped = [reason for shard in done for reason in shard.skipped]
        if len(skipped) > max_bad * self.source.total:
            raise InputError(
                f"encode: {len(skipped)} of {self.source.total} images cannot be read ({skipped[0]}), more than the "
                f"allowed share of {max_bad:g}; repair the shards, or allow a larger share and run the same command "
                "again."
            )
        with _manifest_lock(self.out):
            if not (self.out / MANIFEST).exists():
                write_manifest(self.out, self._manifest(done, skipped))
                self.remove_leftovers()
                clear_unfinished(self.out / FINISHED)
        return read_complete(self.out)

    def _manifest(self, done: list[FinishedShard], skipped: list[str]) -> Manifest:
        statistics, settings = Statistics(), self.settings
        for shard in done:
            statistics.add(shard.statistics)
        return replace(
            self.source,
            kind="latents",
            shards=[shard.info for shard in done if shard.info],
            image_size=self.source.image_size if settings.carries_images else settings.image_size,
            provenance=provenance(),
            latents={
                **settings.record(),
                "has_logvar": max(shard.moment_channels for shard in done) > settings.latent_channels,
                "statistics": (summary := statistics.summary()),
                "statistics_sha256": statistics_digest(summary),
                "source_hash": self.source.hash,
            },
            extra={**self.source.extra, "skipped": skipped},
            format_version=Manifest.format_version,
            places_sha256=None,
            hash_as_read=None,
        )

    def remove_leftovers(self) -> None:
        """Delete unfinished shards of processes that have ended, this rank's earlier ones included."""
        for path in self.out.glob("*.tmp"):
            writer = path.name.split(".")[-2]
            lock = FileLock(self.out / FINISHED / f"{writer}.lock")
            if writer == self.writer or lock.take():
                path.unlink(missing_ok=True)
            lock.release()
