"""Random numbers that belong to an image, not to a batch or a process.

Every number is a pure function of (seed, purpose, index of the image, step, element): Philox 4x32 with ten rounds
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), computed with integer tensors on any device,
so that splitting the work over batches, processes or devices cannot change a single bit of it.

A round multiplies the words c0 and c2 of a counter. They are the two rows of an int32 tensor, less 2^31: the product
of a word s + 2^31 is s M + 2^31 M, one `addcmul` in int64, so a round is three kernels. None waits for a device.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ldmlab.errors import InputError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF
_HALF = 2**31

Shape = tuple[int, ...]
Layout = tuple[tuple[str, int], ...]  # purposes, and how many counters an image has for each


class _Keys(NamedTuple):
    """Of a seed, on a device; each has a row for c0 and one for c2, (2, 1, 1)."""

    rounds: list[Tensor]  # int32, less 2^31
    factors: Tensor  # M, int64
    offsets: Tensor  # 2^31 M


class _Start(NamedTuple):
    """Counters (block, index, step, stream of the purpose) after the first round, for index 0."""

    keys: _Keys  # of the other rounds
    lanes: Tensor  # c0 and c2, (2, 1, T) int32, less 2^31
    others: Tensor  # c1 and c3, (2, 1, T) int32
    middle: Tensor  # 1/2 + 2^-33, (1,) float64


def _rows(first: int, second: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Two numbers as (2, 1, 1), filled in on the device."""
    return torch.cat([torch.full((1, 1, 1), value, dtype=dtype, device=device) for value in (first, second)])


def _keys(seed: int, device: torch.device) -> _Keys:
    low, high = ([(key + turn * weyl & _MASK) - _HALF for turn in range(_ROUNDS)]
                 for key, weyl in zip((seed & _MASK, seed >> 32), _WEYL, strict=True))  # fmt: skip
    rounds = [_rows(*pair, torch.int32, device) for pair in zip(low, high, strict=True)]
    m0, m1 = _MULTIPLIERS
    return _Keys(rounds, _rows(m0, m1, torch.int64, device), _rows(_HALF * m0, _HALF * m1, torch.int64, device))


def _mixed(lanes: Tensor, others: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
    """A round before its key: c0 and c2, less 2^31, and c1 and c3, each (2, B, T) int32."""
    # rows c0 M0, c2 M1, c0 M0, c2 M1, so that c2 M1, from which c0 and c1 come, also stands above c0 M0
    products = torch.addcmul(keys.offsets, lanes.expand(2, *lanes.shape), keys.factors).flatten(0, 1)[1:3]
    if torch.compiler.is_compiling():  # which fuses this, but not a view of other numbers
        high, low = (products >> 32).to(torch.int32), products.to(torch.int32)
    else:
        low, high = products.view(torch.int32).unflatten(-1, (-1, 2)).unbind(-1)
    return high ^ others, low


def _rounds(lanes: Tensor, others: Tensor, keys: _Keys) -> tuple[Tensor, Tensor]:
    """Rounds on c0 and c2, less 2^31, and c1 and c3, each (2, B, T) int32."""
    for key in keys.rounds:
        mixed, others = _mixed(lanes, others, keys)
        lanes = mixed ^ key
    return lanes, others


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter (int64 tensors of one broadcast shape holding values below 2^32)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    lanes, others = (torch.stack(pair).flatten(1)[:, None] for pair in ((c0 - _HALF, c2 - _HALF), (c1, c3)))
    lanes, others = _rounds(lanes.to(torch.int32), others.to(torch.int32), _keys(seed, c0.device))
    words = torch.stack([lanes.long() + _HALF, others.long() & _MASK]).reshape(2, 2, *c0.shape)
    return words[0, 0], words[1, 0], words[0, 1], words[1, 1]


def _start(seed: int, layout: Layout, step: int, device: torch.device) -> _Start:
    block = torch.cat([torch.arange(-_HALF, count - _HALF, device=device) for _, count in layout]).to(torch.int32)
    stream = torch.cat(
        [torch.full((n,), (_crc32(name) ^ _HALF) - _HALF, dtype=torch.int32, device=device) for name, n in layout]
    )
    keys = _keys(seed, device)
    lanes = torch.stack([block, torch.full_like(block, (step & _MASK) - _HALF)])[:, None]
    others = torch.stack([torch.zeros_like(stream), stream])[:, None]
    lanes, others = _rounds(lanes, others, keys._replace(rounds=keys.rounds[:1]))
    middle = torch.full((1,), 0.5 + 2.0**-33, dtype=torch.float64, device=device)
    return _Start(keys._replace(rounds=keys.rounds[1:]), lanes, others, middle)


_kept_start = lru_cache(maxsize=64)(_start)


def _crc32(text: str) -> int:
    """`zlib.crc32`, which torch.compile cannot trace."""
    crc = _MASK
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ _MASK


def _units(seed: int, layout: Layout, index: Tensor, step: int) -> Tensor:
    """Uniform numbers in (0, 1), float64, (2, 2, B, T): of the words c0 and c2, and of c1 and c3."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed={seed} is outside 0 .. 2^64 - 1; choose a non-negative integer.")
    compiling = torch.compiler.is_compiling()
    if compiling and seed >= 2**63:  # no int64 that a graph could take: a graph of its own for each of these seeds
        seed = max({seed})
    kept = type(index) is Tensor and not compiling  # no stand-in for one
    start = (_kept_start if kept else _start)(seed, layout, step, index.device)
    if compiling:  # the low 32 bits of the index enter the row of c0
        lanes = start.lanes ^ torch.stack([index, torch.zeros_like(index)]).to(torch.int32)[..., None]
    else:
        low = (index & _MASK).view(torch.int32).unflatten(0, (-1, 2)).T[..., None]  # (2, B, 1)
        lanes = start.lanes.new_empty(2, len(index), start.lanes.shape[2])
        torch.bitwise_xor(start.lanes, low, out=lanes)
    *before, last = start.keys.rounds
    mixed, low = _mixed(*_rounds(lanes, start.others, start.keys._replace(rounds=before)), start.keys)
    if compiling:
        words = torch.stack([mixed ^ last, low ^ -_HALF])
    else:
        words = mixed.new_empty(2, *mixed.shape)
        torch.bitwise_xor(mixed, last, out=words[0])
        torch.bitwise_xor(low, -_HALF, out=words[1])
    return torch.add(start.middle, words, alpha=2.0**-32)  # (word + 1/2) / 2^32 of words less 2^31, without rounding


def _normals(units: Tensor) -> Tensor:
    """Box and Muller's transform of uniform numbers (2, 2, B, T), in float64; (B, 4 T) float32."""
    radius, angle = torch.sqrt(-2 * torch.log(units[0])), 2 * math.pi * units[1]  # each (2, B, T)
    if torch.compiler.is_compiling():  # which fuses a stack
        pairs = torch.stack([torch.cos(angle), torch.sin(angle)]) * radius
    else:
        pairs = angle.new_empty(2, *angle.shape)
        torch.cos(angle, out=pairs[0])
        torch.sin(angle, out=pairs[1])
        pairs *= radius
    return pairs.permute(2, 3, 1, 0).to(torch.float32, memory_format=torch.contiguous_format).flatten(1)


def draw(
    seed: int, index: Tensor, normals: Mapping[str, Shape], uniforms: Sequence[str] = (), step: int = 0
) -> dict[str, Tensor]:
    """Numbers for several purposes at once, for the images `index` (B,) int64: the same that each gets alone.

    normals: standard normal, float32, (B, *shape), by Box and Muller; uniforms: in (0, 1), float64, (B,).
    The transform runs in float64, so that vector units of other widths, which may differ in its last bit, round to
    the same float32.
    """
    counts = {purpose: math.prod(shape) for purpose, shape in normals.items()}
    layout = [*((purpose, 1) for purpose in uniforms), *((purpose, (n + 3) // 4) for purpose, n in counts.items())]
    if not layout:
        return {}
    units = _units(seed, tuple(layout), index, step)
    numbers = {purpose: units[0, 0, :, place] for place, purpose in enumerate(uniforms)}
    if not normals:
        return numbers
    values = _normals(units[..., len(uniforms) :])
    for purpose, part in zip(counts, values.split([4 * n for _, n in layout[len(uniforms) :]], dim=1), strict=True):
        numbers[purpose] = part[:, : counts[purpose]].reshape(len(index), *normals[purpose])
    return numbers


def normal(seed: int, purpose: str, index: Tensor, shape: Shape, step: int = 0) -> Tensor:
    """Standard normal numbers, float32, (B, *shape)."""
    return draw(seed, index, {purpose: shape}, step=step)[purpose]


def uniform(seed: int, purpose: str, index: Tensor, shape: Shape = (), step: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float64, (B, *shape), for the images `index` (B,) int64."""
    count = math.prod(shape)
    units = _units(seed, ((purpose, (count + 3) // 4),), index, step)
    return units.permute(2, 3, 1, 0).flatten(1)[:, :count].reshape(len(index), *shape)


def integers(seed: int, purpose: str, index: Tensor, high: int, step: int = 0) -> Tensor:
    """Integers in 0 .. high - 1, int64, (B,)."""
    return below(uniform(seed, purpose, index, (), step), high)


def below(uniform: Tensor, high: int) -> Tensor:
    """Uniform numbers in (0, 1), at most 1 - 2^-33 as all here => integers in 0 .. high - 1, int64."""
    return (uniform * high).long()
