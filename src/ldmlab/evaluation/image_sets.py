"""Sets of images on disk that can be scored: a folder of files or of shards, an `.npz` batch of ADM's script."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ldmlab.data.dataset import BatchSpec, ShardDataset
from ldmlab.data.decode import BAD_SAMPLE, decode_image
from ldmlab.data.loaders import eval_loader, quiet_worker
from ldmlab.data.shards import IMAGE_ENDINGS
from ldmlab.data.workers import processors
from ldmlab.errors import InputError
from ldmlab.evaluation.npz import images_shape, read_images, read_statistics
from ldmlab.evaluation.score import Numbered, numbered

_WHITE = (255, 255, 255)  # laid under transparent pixels
_LOSSY = ("jpg", "jpeg")


@dataclass(frozen=True)
class ImageSet:
    """Images of one size in a fixed order."""

    path: Path
    kind: str  # folder | shards | npz
    count: int  # 0: statistics alone
    size: tuple[int, int] | None  # height, width, px; None: no images
    files: tuple[Path, ...] = ()
    manifest_hash: str | None = None

    def batches(self, batch_size: int, rank: int = 0, world: int = 1, workers: int = 2) -> Iterator[Numbered]:
        """This process's share with the images' numbers, uint8 (B, 3, H, W); an unreadable one is an InputError."""
        if self.kind == "npz":
            yield from self._of_npz(batch_size, rank, world)
        elif self.kind == "shards":
            assert self.size is not None
            dataset = ShardDataset(self.path, BatchSpec(self.size[0], fields=()))
            loader = eval_loader(dataset, batch_size=batch_size, world=world, rank=rank, workers=workers)
            yield from numbered(_complete(loader))
        else:
            yield from self._of_folder(batch_size, rank, world, workers)

    def statistics(self) -> dict[str, tuple[Any, Any]]:
        """Mean and covariance by score that the file brings along."""
        return read_statistics(self.path) if self.kind == "npz" else {}

    def record(self) -> dict[str, Any]:
        """For the result."""
        size = None if self.size is None else f"{self.size[0]}x{self.size[1]}"
        lossy = sum(file.suffix[1:].lower() in _LOSSY for file in self.files)
        return {
            "path": str(self.path),
            "kind": self.kind,
            "images": self.count,
            "size": size,
            **({"jpeg_files": lossy} if lossy else {}),
            **({"manifest_hash": self.manifest_hash} if self.manifest_hash else {}),
        }

    def _of_npz(self, batch_size: int, rank: int, world: int) -> Iterator[Numbered]:
        for number, rows in enumerate(read_images(self.path, batch_size)):
            if number % world == rank:
                first = number * batch_size
                yield torch.arange(first, first + len(rows)), torch.from_numpy(rows.copy()).permute(0, 3, 1, 2)

    def _of_folder(self, batch_size: int, rank: int, world: int, workers: int) -> Iterator[Numbered]:
        mine = list(range(rank, self.count, world))
        loader = DataLoader(
            _Files(self.files),
            batch_sampler=[mine[start : start + batch_size] for start in range(0, len(mine), batch_size)],
            num_workers=min(workers, processors()),
            collate_fn=list,
            worker_init_fn=quiet_worker if workers else None,
        )
        for items in loader:
            for number, found in items:
                if isinstance(found, str):
                    raise InputError(f"{self.files[number]} cannot be read ({found}); mend or remove it.")
                if tuple(found.shape[1:]) != self.size:
                    height, width = found.shape[1:]
                    assert self.size is not None
                    raise InputError(
                        f"{self.files[number]} has {height}x{width} px where {self.files[0].name} has "
                        f"{self.size[0]}x{self.size[1]}; bring them to one size first (`ldmlab pack --size`)."
                    )
            yield torch.tensor([number for number, _ in items]), torch.stack([image for _, image in items])


class _Files(Dataset[tuple[int, Tensor | str]]):
    """Number and image uint8 (3, H, W), or why it cannot be read: workers hand errors on as text."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, _image(self.files[number])
        except BAD_SAMPLE as error:
            return number, f"{type(error).__name__}: {error}".splitlines()[0]


def _image(path: Path) -> Tensor:
    return torch.from_numpy(decode_image({path.suffix[1:].lower(): path.read_bytes()}, None, _WHITE))


def _complete(loader: Any) -> Iterator[Any]:
    """The loader's batches, none of whose samples may be left out."""
    for batch in loader:
        if batch["skipped"]:
            raise InputError(f"{batch['skipped'][0]}; a score needs every image, so write the shards again.")
        yield batch


def image_set(path: Path) -> ImageSet:
    """Find out what a path holds."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give a folder of images or shards, or an .npz file.")
    if path.is_file():
        if path.suffix != ".npz":
            raise InputError(f"{path} is no .npz file; give one, or a folder of images or shards.")
        shape = images_shape(path)
        if shape is None and not read_statistics(path):
            raise InputError(f"{path} holds neither arr_0 nor mu and sigma; give a batch of ADM's evaluation script.")
        return ImageSet(path, "npz", shape[0] if shape else 0, shape[1:] if shape else None)
    if (path / "manifest.json").exists() or any(path.glob("*.tar")):
        return _shards(path)
    endings = {f".{ending}" for ending in IMAGE_ENDINGS}
    files = tuple(sorted(file for file in path.rglob("*") if file.suffix.lower() in endings))
    if not files:
        raise InputError(f"{path} holds no images and no shards; give another folder.")
    _, first = _Files(files)[0]
    if isinstance(first, str):
        raise InputError(f"{files[0]} cannot be read ({first}); mend or remove it.")
    return ImageSet(path, "folder", len(files), (first.shape[1], first.shape[2]), files)


def _shards(path: Path) -> ImageSet:
    from ldmlab.data.latent_shards import read_shard_manifest

    manifest = read_shard_manifest(path)
    side = manifest.image_size
    if manifest.kind != "images" or side is None:
        raise InputError(f"{path} holds no square images of one size; write such shards with `ldmlab pack --size`.")
    return ImageSet(path, "shards", manifest.total, (side, side), manifest_hash=manifest.hash)
