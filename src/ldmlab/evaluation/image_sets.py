"""Sets of images on disk, scored one against another: a folder of files or of shards, an `.npz` of ADM's script."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from ldmlab import distributed
from ldmlab.contracts import FeatureExtractor
from ldmlab.data.batch_spec import BatchSpec
from ldmlab.data.dataset import ShardDataset
from ldmlab.data.decode import BAD_SAMPLE, decode_image
from ldmlab.data.loaders import eval_loader, quiet_worker
from ldmlab.data.manifest import read_manifest
from ldmlab.data.tars import IMAGE_ENDINGS
from ldmlab.data.transforms import WHITE
from ldmlab.data.workers import processors
from ldmlab.errors import InputError
from ldmlab.evaluation.controls import control_count, controls
from ldmlab.evaluation.npz import images_shape, read_images, read_statistics
from ldmlab.evaluation.record import check_transform
from ldmlab.evaluation.run import Run
from ldmlab.evaluation.scoring import EvaluationPass, Numbered, OptionNames, Track, numbered, untracked
from ldmlab.metrics.features import Inception2015
from ldmlab.metrics.frechet import FrechetDistance
from ldmlab.open_image import read_image
from ldmlab.stored_names import is_overview

_LOSSY = ("jpg", "jpeg")
OPTIONS = OptionNames(metrics="metrics", features="--features ")


@dataclass
class ImageSet:
    """Images of one size in a fixed order: a source of images, or the samples' reference."""

    path: Path
    kind: str  # folder | shards | npz
    count: int  # 0: statistics alone
    size: tuple[int, int] | None  # height, width, px; None: no images
    files: tuple[Path, ...] = ()
    manifest_hash: str | None = None
    workers: int = 2
    max_bad: float = 0.0  # share of the images that may be unreadable
    captions: None = None
    batch_size: int = 64  # as the reference
    track: Track = untracked
    lost: dict[str, str] = field(default_factory=dict)  # images of this process that cannot be read => why

    def images(self, batch_size: int, track: Track = untracked) -> Iterator[Numbered]:
        """This process's share with the images' numbers, uint8 (B, 3, H, W); unreadable ones are left out."""
        rank, world = distributed.rank(), distributed.world_size()
        title = f"images of {self.path.name}, batches of {batch_size}"
        yield from track(self.batches(batch_size, rank, world), -(-self.count // (batch_size * world)), title)

    def batches(self, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Numbered]:
        """The share of one of several processes."""
        if self.kind == "npz":
            yield from self._of_npz(batch_size, rank, world)
        elif self.kind == "shards":
            assert self.size is not None
            dataset = ShardDataset(self.path, BatchSpec(self.size[0], fields=()))
            for batch in eval_loader(dataset, batch_size=batch_size, world=world, rank=rank, workers=self.workers):
                for entry in batch["skipped"]:
                    label, _, reason = entry.partition(": ")
                    self._lose(label, reason)
                yield from numbered([batch])
        else:
            yield from self._of_folder(batch_size, rank, world)

    @cached_property
    def statistics(self) -> dict[str, tuple[Any, Any]]:
        """Mean and covariance by score in the file."""
        return read_statistics(self.path) if self.kind == "npz" else {}

    def given(self, seen: EvaluationPass) -> frozenset[str]:
        """Metrics whose statistics replace the images; a score that lacks both is refused."""
        found = frozenset(n for n, m in seen.metrics.items() if getattr(m, "statistics_name", None) in self.statistics)
        if found and seen.extractor.name != Inception2015.name:
            raise InputError(
                f"{self.path} has statistics of {Inception2015.name}, which --features {seen.extractor.name} "
                "cannot be compared with; choose --features inception."
            )
        if self.count == 0 and (lost := sorted(seen.metrics.keys() - found)):
            raise InputError(
                f"{self.path} holds statistics and no images, which score {lost[0]} needs; leave it out of --metrics."
            )
        return found

    def show_to(self, seen: EvaluationPass) -> None:
        """Statistics where there are any, and images where a metric needs them."""
        given = self.given(seen)
        for name in given:
            metric = seen.metrics[name]
            assert isinstance(metric, FrechetDistance)
            mean, covariance = (torch.as_tensor(part) for part in self.statistics[metric.statistics_name])
            metric.take_real(mean, covariance, distributed.rank() == 0)
        if self.count and not given >= seen.metrics.keys():
            seen.add_all(self.images(self.batch_size, self.track), real=True)

    def record(self, images: int) -> dict[str, Any]:
        """Also of images that statistics replaced."""
        size = None if self.size is None else f"{self.size[0]}x{self.size[1]}"
        lossy = sum(file.suffix[1:].lower() in _LOSSY for file in self.files)
        lost = {name: why for part in distributed.gather(self.lost) for name, why in part.items()}
        names = [f"{name}: {why}" for name, why in sorted(lost.items())][:20]
        return {
            "path": str(self.path),
            "kind": self.kind,
            "images": images or self.count - len(lost),
            "size": size,
            **({"unreadable": {"count": len(lost), "of": self.count, "names": names}} if lost else {}),
            **({"jpeg_files": lossy} if lossy else {}),
            **({"manifest_hash": self.manifest_hash} if self.manifest_hash else {}),
        }

    def marks(self) -> tuple[str, ...]:
        """Of every score that rests on this set."""
        lost = sum(len(part) for part in distributed.gather(self.lost))
        return (f"{self.count - lost:,} of {self.count:,} images of {self.path.name} could be read",) if lost else ()

    def _lose(self, name: str, why: str) -> None:
        """Count an unreadable image; refused above `max_bad`."""
        self.lost[name] = why
        if len(self.lost) > self.max_bad * self.count:
            raise InputError(
                f"{name} cannot be read ({why}); fix or remove it, or allow a share of unreadable images by --max-bad."
            )

    def _of_npz(self, batch_size: int, rank: int, world: int) -> Iterator[Numbered]:
        for number, rows in enumerate(read_images(self.path, batch_size)):
            if number % world == rank:
                first = number * batch_size
                yield torch.arange(first, first + len(rows)), torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)

    def _of_folder(self, batch_size: int, rank: int, world: int) -> Iterator[Numbered]:
        mine = list(range(rank, self.count, world))
        loader = DataLoader(
            _Files(self.files),
            batch_sampler=[mine[start : start + batch_size] for start in range(0, len(mine), batch_size)],
            num_workers=min(self.workers, processors()),
            collate_fn=list,
            worker_init_fn=quiet_worker if self.workers else None,
        )
        for items in loader:
            read = {number: image for number, image in items if isinstance(image, Tensor)}
            for number, found in items:
                if isinstance(found, str):
                    self._lose(str(self.files[number]), found)
                elif tuple(found.shape[1:]) != self.size:
                    height, width = found.shape[1:]
                    assert self.size is not None
                    raise InputError(
                        f"{self.files[number]} has {height}x{width} px where {self.files[0].name} has "
                        f"{self.size[0]}x{self.size[1]}; bring them to one size first (`ldmlab pack --size`)."
                    )
            if read:
                yield torch.tensor(list(read)), torch.stack(list(read.values()))


class _Files(Dataset[tuple[int, Tensor | str]]):
    """Number and image uint8 (3, H, W), or why it cannot be read: workers hand errors on as text."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            path = self.files[number]
            files = {path.suffix[1:].lower(): read_image(path)}
            return number, torch.from_numpy(decode_image(files, None, WHITE))
        except BAD_SAMPLE as error:
            return number, f"{type(error).__name__}: {error}".splitlines()[0]


def image_set(path: Path, workers: int = 2, max_bad: float = 0.0) -> ImageSet:
    """The image set at a path: folder, shards or `.npz`."""
    made = partial(ImageSet, path, workers=workers, max_bad=max_bad)
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder of images or shards, or an .npz file.")
    if path.is_file():
        if path.suffix != ".npz":
            raise InputError(f"{path} is no .npz file; give one, or a folder of images or shards.")
        shape = images_shape(path)
        if shape is None and not read_statistics(path):
            raise InputError(f"{path} holds neither arr_0 nor mu and sigma; give a batch of ADM's evaluation script.")
        return made("npz", shape[0] if shape else 0, shape[1:] if shape else None)
    if (path / "manifest.json").exists() or any(path.glob("*.tar")):
        manifest = read_manifest(path)
        side = manifest.image_size
        if manifest.kind != "images":
            raise InputError(f"{path} holds {manifest.kind}, not images; give the images that they were encoded from.")
        if side is None:
            raise InputError(f"{path} holds no square images of one size; write such shards with `ldmlab pack --size`.")
        check_transform(path, manifest)
        return made("shards", manifest.total, (side, side), manifest_hash=manifest.hash)
    endings = {f".{ending}" for ending in IMAGE_ENDINGS}
    found = (file for file in path.rglob("*") if file.suffix.lower() in endings)
    files = tuple(sorted(file for file in found if not is_overview(file)))
    if not files:
        raise InputError(f"{path} holds no images and no shards; give another folder.")
    opened = _Files(files)
    first = next((image for _, image in (opened[i] for i in range(len(files))) if isinstance(image, Tensor)), None)
    if first is None:
        raise InputError(f"none of {len(files)} images of {path} can be read ({opened[0][1]}); give another folder.")
    return made("folder", len(files), (first.shape[1], first.shape[2]), files)


def score_sets(
    samples: ImageSet,
    reference: ImageSet,
    extractor: FeatureExtractor,
    metrics: Mapping[str, Metric],
    *,
    batch_size: int = 64,
    track: Track = untracked,
    at_most: int = 0,
) -> dict[str, Any]:
    """The scores of one set against another as plain data, on every process, beside noise: `at_most` images of it."""
    if samples.count == 0:
        raise InputError(f"{samples.path} holds no images, so there is nothing to score.")
    if reference.size is not None and samples.size != reference.size:
        height, width = samples.size or (0, 0)
        raise InputError(
            f"{samples.path} has images of {height}x{width} px and {reference.path} of "
            f"{reference.size[0]}x{reference.size[1]}; bring both to one size by one rule (`ldmlab pack --size`)."
        )
    reference.batch_size, reference.track = batch_size, track
    run = Run(samples, reference, extractor, metrics, batch_size, track, OPTIONS)
    seen = run.begin()
    if at_most and samples.size is not None:
        count = control_count(seen, samples.count, at_most)
        run.controls = controls(seen, count, samples.size, None)
    result = run.finish(seen)
    result["reference"]["given_statistics"] = sorted(reference.given(seen))
    for score in result["scores"].values():
        score["marks"] = (*samples.marks(), *score["marks"])
    return {("samples" if name == "sampling" else name): value for name, value in result.items()}


def statistics_of(metrics: Mapping[str, Metric]) -> dict[str, tuple[Any, Any]]:
    """Mean and covariance of the samples by score, for an `.npz`; after `score_sets`."""
    found = ((m.statistics_name, m.samples()) for m in metrics.values() if isinstance(m, FrechetDistance))
    return {name: (mean.cpu().numpy(), covariance.cpu().numpy()) for name, (mean, covariance) in found}
