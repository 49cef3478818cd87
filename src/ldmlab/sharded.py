"""Sharded tensors (DTensor) in a checkpoint that is a folder.

    step_00000100.ckpt/
        state.ckpt                 the content, as in a checkpoint of one file; sharded tensors are on the meta device
        shard_00000.safetensors    shards of one process, named by the tensor's path and their first index: /a/0/b@4,0

`state.ckpt` is written last and lists size and CRC-32C of the files. Any number of processes can read any slices.
torch.distributed.checkpoint has no checksums, and its files are pickles, which may run code.
"""

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import safetensors
import torch
from torch import Tensor

STATE = "state.ckpt"
T = TypeVar("T")
_NAME = re.compile(r"shard_\d{5,}\.safetensors")
_CHUNK_BYTES = 2**20


def mapped(content: Any, change: Callable[[Any, str], Any], path: str = "") -> Any:
    """The same structure with `change(value, path)` in place of each value; paths are keys and indices: `/a/0/b`."""
    if isinstance(content, Mapping):
        new: Any = copy.copy(content)
        new.update({name: mapped(part, change, f"{path}/{name}") for name, part in content.items()})
        return new
    if type(content) in (list, tuple):
        return type(content)([mapped(part, change, f"{path}/{index}") for index, part in enumerate(content)])
    return change(content, path)


@dataclass
class Parts:
    """The shards that one process holds of the tensors of a checkpoint."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by path and the indices of the first element
    found: bool = False  # whether any tensor is sharded, even if this process has an empty shard


def split(content: Any) -> tuple[Any, Parts]:
    """The content with meta tensors in place of sharded ones, and this process's shards.

    Of a replicated shard (HSDP) only the first process has it.
    """
    parts = Parts()

    def cut(value: Any, path: str) -> Any:
        if not is_sharded(value):
            return value
        parts.found = True
        begin, own = box_of(value)
        place: Sequence[int] = value.device_mesh.get_coordinate() or ()
        if prod(own) and all(p.is_shard() or not at for p, at in zip(value.placements, place, strict=True)):
            parts.tensors[f"{path}@{','.join(map(str, begin))}"] = value.to_local().detach()
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    return mapped(content, cut), parts


def is_sharded(value: Any) -> bool:
    """Whether it is a DTensor, without importing DTensor, which takes seconds."""
    return isinstance(value, Tensor) and hasattr(value, "placements")


def by_layout(items: Iterable[T], tensor: Callable[[T], Any] = lambda item: item) -> list[list[T]]:
    """The sharded ones and the others, in lists that are not empty: operations on many tensors take no mixture."""
    both: tuple[list[T], list[T]] = ([], [])
    for item in items:
        both[is_sharded(tensor(item))].append(item)
    return [part for part in both if part]


def box_of(tensor: Any) -> tuple[list[int], list[int]]:
    """First index and shape of this process's shard."""
    (chunk,) = tensor.__create_chunk_list__()
    return list(chunk.offsets), list(chunk.sizes)


def shard_name(rank: int) -> str:
    """`shard_<rank>.safetensors`."""
    return f"shard_{rank:05d}.safetensors"


def mark(path: Path) -> list[int]:
    """Size in bytes and CRC-32C of a file."""
    sums = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            sums.update(chunk)
    return [path.stat().st_size, int.from_bytes(sums.digest(), "big")]


@dataclass(frozen=True)
class _Piece:
    file: Any  # of safetensors; it maps the file
    name: str
    begin: list[int]
    shape: list[int]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the shards of a checkpoint, read lazily and by slices."""

    shape: torch.Size
    dtype: torch.dtype
    pieces: Sequence[_Piece]
    ndim = property(lambda self: len(self.shape))

    def read(self, begin: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> Tensor:
        """The slice of `shape` that begins at the indices `begin`, or the full tensor, on the CPU."""
        begin, shape = begin or [0] * self.ndim, self.shape if shape is None else shape
        box = torch.zeros(tuple(shape), dtype=self.dtype)
        for piece in self.pieces:
            low = [max(a, b) for a, b in zip(begin, piece.begin, strict=True)]
            ends = zip(begin, shape, piece.begin, piece.shape, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if all(a < b for a, b in zip(low, high, strict=True)):
                source = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, piece.begin, strict=True))
                target = tuple(slice(a - o, b - o) for a, b, o in zip(low, high, begin, strict=True))
                box[target] = piece.file.get_slice(piece.name)[source]
        return box


def laid_out(value: Any, like: Any) -> Tensor:
    """The tensor sharded as `like` is; the full tensor if `like` is not sharded."""
    stored = isinstance(value, StoredTensor)
    if not is_sharded(like) or is_sharded(value):
        return value.read() if stored else value
    from torch.distributed.tensor import DTensor

    begin, shape = box_of(like)
    box = tuple(slice(b, b + n) for b, n in zip(begin, shape, strict=True))
    local = (value.read(begin, shape) if stored else value[box]).to(like.device)
    mesh, places = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, places, run_check=False, shape=like.shape, stride=like.stride())


def attach(content: Any, folder: Path | None, process: tuple[int, int] = (0, 1)) -> Any:
    """`StoredTensor`s in place of the meta tensors; ValueError where shards are damaged or missing.

    folder: None for a checkpoint of one file; process: rank and world size of the processes that check the checksums,
    each of every world-size-th file.
    """
    index = _index(folder, content.pop("shards", None), process) if folder is not None else {}

    def stored(value: Any, path: str) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        pieces = index.get(path, [])
        different = len({tuple(piece.begin) for piece in pieces}) == len(pieces)
        if sum(prod(piece.shape) for piece in pieces) != value.numel() or not different:
            raise ValueError(f"it lacks parts of {path}")
        for piece in pieces:
            inside = all(
                type(b) is int and 0 <= b <= m - n
                for b, n, m in zip(piece.begin, piece.shape, value.shape, strict=True)
            )
            if not inside:
                raise ValueError(f"it holds a part of {path} that does not fit")
        return StoredTensor(value.shape, value.dtype, pieces)

    return mapped(content, stored)


def _index(folder: Path, marks: Any, process: tuple[int, int]) -> dict[str, list[_Piece]]:
    """The pieces of each tensor, by its path."""
    if not isinstance(marks, dict) or not all(isinstance(name, str) and _NAME.fullmatch(name) for name in marks):
        raise ValueError("it lists no shards")
    rank, world = process
    found: dict[str, list[_Piece]] = {}
    for number, (name, noted) in enumerate(sorted(marks.items())):
        if not (folder / name).is_file():
            raise ValueError(f"its {name} is missing")
        if number % world == rank and mark(folder / name) != noted:
            raise ValueError(f"its {name} is damaged: the checksum differs")
        file = safetensors.safe_open(folder / name, framework="pt")
        for key in file.keys():  # noqa: SIM118 - it is no mapping
            path, _, begin = key.rpartition("@")
            piece = _Piece(file, key, [int(index) for index in begin.split(",")], file.get_slice(key).get_shape())
            found.setdefault(path, []).append(piece)
    return found


def whole(content: Any) -> Any:
    """The same structure with its stored tensors read in full."""
    return mapped(content, lambda value, _: value.read() if isinstance(value, StoredTensor) else value)
