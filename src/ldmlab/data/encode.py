"""Image shards to latent shards, one for one; any number of processes share the work and any of them may be killed.

A finished shard has a small file in `.encoded/`; whoever finds all of them writes the manifest.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldmlab.data.decode import BAD_SAMPLE, boxes_following, decode_fields, decode_image
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
from ldmlab.data.shards import Files, ShardReader, image_ending
from ldmlab.errors import InputError
from ldmlab.provenance import provenance

EncodeMoments = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) => moments float32 (B, 2C or C, h, w), on the CPU
_Encoders = tuple[EncodeMoments, EncodeStates | None]
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
    carries_images: bool = False  # keep the image beside its moments
    first_stage: dict[str, Any] | None = None  # how to build it, plain types
    states: dict[str, Any] | None = None  # by conditioner: what made the states stored beside the moments, plain types

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise InputError(f"encode.dtype={self.dtype} is not a format of latents; choose float16 or float32.")
        if self.image_size % self.downsampling:
            raise InputError(
                f"data.image_size={self.image_size} is not divisible by the first stage's downsampling "
                f"{self.downsampling}; choose a multiple of it."
            )

    @property
    def told(self) -> tuple[str, ...]:
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
    progress: Callable[[int, int], None] | None = None,  # (done, total) images of this process
    encode_states: EncodeStates | None = None,  # with settings.states
) -> EncodeResult:
    """Encode shards rank, rank + world, ... of `source`; the same call again continues where it stopped."""
    source, out = Path(source), Path(out)
    manifest = _source_manifest(source, settings)
    open_plan(out, {"source": manifest.hash, **asdict(settings)})
    if (out / MANIFEST).exists():
        return EncodeResult(0, manifest.total, read_manifest(out))
    mine = range(rank, len(manifest.shards), world)
    todo = [shard for shard in mine if finished_shard(out, manifest, shard) is None]
    total = sum(manifest.shards[shard].samples for shard in mine)
    kept = done = total - sum(manifest.shards[shard].samples for shard in todo)
    batches = iter(_loader(_Images(source, manifest, settings), todo, batch_size, workers))
    encoders = encode_moments, encode_states
    for shard in todo:
        samples = manifest.shards[shard].samples
        for encoded in _encode_shard(out, manifest.shards[shard], encoders, settings, batches, batch_size):
            if progress:
                progress(done + encoded, total)
        done += samples
    return EncodeResult(done - kept, kept, complete(out, manifest, settings, max_bad))


def _source_manifest(source: Path, settings: LatentSettings) -> Manifest:
    """Of images that carry all that is asked for; InputError otherwise."""
    manifest = read_manifest(source)
    if manifest.kind != "images":
        raise InputError(f"data={source} holds {manifest.kind}, not images; give the image shards to encode.")
    if missing := sorted(set(settings.told) - set(manifest.fields)):
        raise InputError(
            f"conditioner: its states are made from {missing[0]}, which data={source} does not carry (it has "
            f"{', '.join(manifest.fields) or 'no fields'}); leave the conditioner out, or pack the images with it."
        )
    check_shards(source, manifest)
    return manifest


def _encode_shard(
    out: Path,
    info: ShardInfo,
    encoders: _Encoders,
    settings: LatentSettings,
    batches: Iterator["_Batch"],
    batch_size: int,
) -> Iterator[int]:
    """Write one latent shard and its side file; yields the images seen after every batch."""
    writer, skipped = LatentShardWriter(out / info.name, settings.latent_channels, settings.dtype), list[str]()
    try:
        for begin in range(0, info.samples, batch_size):
            batch = next(batches)
            _encode_batch(batch, *encoders, settings, writer)
            skipped += batch.skipped
            yield min(begin + batch_size, info.samples)
        writer.finish(skipped).save(side_file(out, info.name))
    except OSError as error:
        raise InputError(f"OUT={out}: {info.name} cannot be written ({error}); run the same again to go on.") from error
    finally:
        writer.abandon()


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
        red, green, blue = manifest.transform.get("background") or (255, 255, 255)
        self._background = (red, green, blue)

    def __getitem__(self, place: tuple[int, int]) -> "_Image | str":
        try:
            key, files = self.reader.read(*place)
            image = decode_image(files, self._settings.image_size, self._background)
            fields = decode_fields(files, self._settings.told)
        except BAD_SAMPLE as error:
            return f"{self.reader.label(*place)}: {type(error).__name__}: {error}"
        if not self._settings.carries_images:
            files = boxes_following(files)
            files.pop(image_ending(files) or "")
        files.pop("npy", None)
        return key, image, files, fields


def _loader(images: _Images, shards: list[int], batch_size: int, workers: int) -> DataLoader[_Batch]:
    """Batches in stored order, none over the border of a shard."""

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
    fields = {name: [told[name] for _, _, _, told in good] for name in (good[0][3] if good else ())}
    return _Batch([key for key, _, _, _ in good], images, [files for _, _, files, _ in good], fields, reasons)


def _encode_batch(
    batch: _Batch,
    encode_moments: EncodeMoments,
    encode_states: EncodeStates | None,
    settings: LatentSettings,
    writer: LatentShardWriter,
) -> None:
    if not batch.keys:
        return
    views = [encode_moments(batch.images)]
    if settings.mirrored:
        views.append(encode_moments(batch.images.flip(-1)))
    moments = torch.stack(views, dim=1).float().cpu().numpy()  # (B, views, 2C or C, h, w)
    side = settings.image_size // settings.downsampling
    if moments.shape[2] not in (settings.latent_channels, 2 * settings.latent_channels) or moments.shape[3] != side:
        raise ValueError(f"moments of shape {moments.shape[2:]} do not fit {settings}")
    states = encode_states(batch.images, batch.fields) if encode_states else {}
    for index, (key, files) in enumerate(zip(batch.keys, batch.travelling, strict=True)):
        stored = state_files(key, {name: values[index] for name, values in states.items()})
        writer.write(key, moments[index], {**files, **stored})


FINISHED = ".encoded"  # one file per finished shard
_PLAN_TEMPORARY = "encode.tmp"


def open_plan(out: Path, plan: dict[str, Any]) -> None:
    """Make `out` ours, or refuse what other settings began; every process may come first."""
    plan = json.loads(json.dumps(plan))  # tuples as lists, as they come back from the file
    ours = {FINISHED, ENCODE_PLAN, _PLAN_TEMPORARY}  # another process may be just as far
    if out.exists() and not (out / ENCODE_PLAN).exists() and {path.name for path in out.iterdir()} - ours:
        raise InputError(f"OUT={out} holds something else than latents; choose a new folder.")
    (out / FINISHED).mkdir(parents=True, exist_ok=True)
    with _locked(out):
        path = out / ENCODE_PLAN
        if not path.exists():
            temporary = out / _PLAN_TEMPORARY
            temporary.write_text(json.dumps(plan, indent=1), encoding="utf-8")
            os.replace(temporary, path)
        before = json.loads(path.read_text(encoding="utf-8"))
    if before.get("fingerprint") != plan["fingerprint"]:
        raise InputError(f"OUT={out} holds latents of another first stage; choose a new folder.")
    differing = [name for name in plan if before.get(name) != plan[name]]
    if differing:
        values = ", ".join(f"{name}={before.get(name)} there, {plan[name]} now" for name in differing)
        raise InputError(f"OUT={out} was begun with other settings ({values}); use the same or choose a new folder.")


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


def complete(out: Path, source: Manifest, settings: LatentSettings, max_bad: float) -> Manifest | None:
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
    with _locked(out):
        if not (out / MANIFEST).exists():
            write_manifest(out, _manifest(source, settings, done, skipped))
            for leftover in out.glob("*.tmp"):  # of killed processes
                leftover.unlink(missing_ok=True)
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
        picture_size=source.picture_size if settings.carries_images else settings.image_size,
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


class _locked:
    """One process at a time; the system frees the lock of a killed one."""

    def __init__(self, out: Path) -> None:
        self._path = out / FINISHED / "lock"

    def __enter__(self) -> None:
        self._lock = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)
