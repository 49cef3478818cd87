"""Image shards to latent shards, one for one; any number of processes share the work and any of them may be killed.

A finished shard has a small file in `.encoded/`; whoever finds all of them writes the manifest.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldmlab.data.decode import BAD_SAMPLE, decode_fields, decode_image
from ldmlab.data.encode_folder import LatentSettings, complete, finished_shard, open_plan, side_file
from ldmlab.data.latent_shards import LatentShardWriter
from ldmlab.data.latent_states import EncodeStates, state_files
from ldmlab.data.loader import QuietLoader
from ldmlab.data.manifest import MANIFEST, Manifest, ShardInfo, check_shards, read_manifest
from ldmlab.data.parts import boxes_following
from ldmlab.data.reader import Files, ShardReader
from ldmlab.data.stream import IndexBatches
from ldmlab.data.tar_samples import image_ending
from ldmlab.errors import InputError

EncodeMoments = Callable[[Tensor], Tensor]  # uint8 (B, 3, H, W) => moments float32 (B, 2C or C, h, w), on the CPU
_Encoders = tuple[EncodeMoments, EncodeStates | None]
_Image = tuple[str, NDArray[np.uint8], Files, dict[str, Any]]  # key, uint8 (3, H, W), travelling files, fields


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
