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
    """Counters (block, index, step, stream of the purpose) after two rounds, without what an index adds to them."""

    keys: _Keys  # of the rounds four to nine
    last: Tensor  # of the tenth, (2, 2, 1, 1) for c1, c3, c0 and c2: all words of it are less 2^31
    second: (
        _Keys  # of the second round, whose c0 alone has the index: its key is c0 of index 0, (1,); rows for c0 and c2
    )
    third: Tensor  # what the index does not reach in c1 and c3, with the key, c0 and c2: (2, 2, 1, T) int32
    scale: Tensor  # 2 pi of an angle and -2 of a logarithm, (2, 1, 1, 1) float64
    middle: Tensor  # 1/2 + 2^-33, (1,) float64


def _rows(first: float, second: float, dtype: torch.dtype, device: torch.device) -> Tensor:
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
    low, high = _halves(_products(lanes, keys))
    return high ^ others, low


def _products(lanes: Tensor, keys: _Keys) -> Tensor:
    """c2 M1, from which c0 and c1 come, above c0 M0: the middle of the rows c0 M0, c2 M1, c0 M0, c2 M1; int64."""
    return torch.addcmul(keys.offsets, lanes.expand(2, *lanes.shape), keys.factors).flatten(0, 1)[1:3]


def _halves(products: Tensor) -> Tensor:
    """Low and high words of int64 numbers, int32 in a first axis of two; eager they are a view."""
    if torch.compiler.is_compiling():  # which fuses this, but not a view of other numbers
        return torch.stack([products.to(torch.int32), (products >> 32).to(torch.int32)])
    return products.view(torch.int32).unflatten(-1, (-1, 2)).movedim(-1, 0)


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
    one, two, three, *rest, ten = keys.rounds
    lanes, others = _rounds(lanes, others, keys._replace(rounds=[one]))
    mixed, low = _mixed(lanes, others, keys)  # rows of c0 and c1, which no index has reached, and c2 and c3
    third = torch.stack(
        [torch.cat([low[:1], torch.zeros_like(low[1:])]) ^ three, torch.cat([mixed[:1], others[1:]]) ^ two]
    )
    own = (_rows(0, number, torch.int64, device) for number in (_MULTIPLIERS[0], _HALF * _MULTIPLIERS[0]))
    second = _Keys([lanes[0, 0, :1]], *own)
    scale = _rows(2 * math.pi, -2.0, torch.float64, device)[..., None]
    middle = torch.full((1,), 0.5 + 2.0**-33, dtype=torch.float64, device=device)
    last = torch.stack([torch.full_like(ten, -_HALF), ten])
    return _Start(keys._replace(rounds=rest), last, second, third, scale, middle)


_kept_start = lru_cache(maxsize=64)(_start)


def _crc32(text: str) -> int:
    """`zlib.crc32`, which torch.compile cannot trace."""
    crc = _MASK
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ _MASK


def _units(seed: int, layout: Layout, index: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Uniform numbers in (0, 1), float64, (2, 2, B, T), of the words c1 and c3, and of c0 and c2; `_Start.scale`."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed={seed} is outside 0 .. 2^64 - 1; choose a non-negative integer.")
    compiling = torch.compiler.is_compiling()
    if compiling and seed >= 2**63:  # no int64 that a graph could take: a graph of its own for each of these seeds
        seed = max({seed})
    kept = type(index) is Tensor and not compiling  # no stand-in for one
    start = (_kept_start if kept else _start)(seed, layout, step, index.device)
    if not (compiling or len(index)):  # no row whose words could be viewed
        return index.new_empty((2, 2, 0, sum(count for _, count in layout)), dtype=torch.float64), start.scale
    index = index[:, None]
    low = index.to(torch.int32) if compiling else index.contiguous().view(torch.int32)[:, :1]
    first = low ^ start.second.rounds[0]  # (B, 1)
    second = torch.addcmul(start.second.offsets, first, start.second.factors)  # (2, B, 1), row 0 is 0
    others, lanes = _halves(second) ^ start.third  # (2, B, T)
    lanes, others = _rounds(*_mixed(lanes, others, start.keys), start.keys)
    halves = _halves(_products(lanes, start.keys))  # (2, 2, B, T)
    halves[1].bitwise_xor_(others)
    # words less 2^31, of which log and cos need a plain layout
    words = (
        halves ^ start.last if compiling else torch.bitwise_xor(halves, start.last, out=halves.new_empty(halves.shape))
    )
    return torch.add(start.middle, words, alpha=2.0**-32), start.scale  # (word + 1/2) / 2^32, without rounding


def _normals(units: Tensor, scale: Tensor) -> Tensor:
    """Box and Muller's transform of uniform numbers (2, 2, B, T), in float64; (B, 4 T) float32. Overwrites them."""
    if torch.compiler.is_compiling():
        angle, square = torch.stack([units[0], torch.log(units[1])]) * scale  # each (2, B, T)
        pairs = torch.stack([torch.cos(angle), torch.sin(angle)]) * torch.sqrt(square)
        return pairs.permute(2, 3, 1, 0).to(torch.float32, memory_format=torch.contiguous_format).flatten(1)
    units[1].log_()
    angle, square = units * scale
    pairs = angle.new_empty(2, *angle.shape)
    torch.cos(angle, out=pairs[0])
    torch.sin(angle, out=pairs[1])
    made = angle.new_empty(*angle.shape[1:], 2, 2, dtype=torch.float32)  # (B, T, 2, 2)
    torch.mul(pairs, square.sqrt_(), out=made.permute(3, 2, 0, 1))
    return made.flatten(1)


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
    units, scale = _units(seed, tuple(layout), index, step)
    numbers = {purpose: units[1, 0, :, place] for place, purpose in enumerate(uniforms)}
    if not normals:
        return numbers
    values = _normals(units[..., len(uniforms) :], scale)
    for purpose, part in zip(counts, values.split([4 * n for _, n in layout[len(uniforms) :]], dim=1), strict=True):
        numbers[purpose] = part[:, : counts[purpose]].reshape(len(index), *normals[purpose])
    return numbers


def normal(seed: int, purpose: str, index: Tensor, shape: Shape, step: int = 0) -> Tensor:
    """Standard normal numbers, float32, (B, *shape)."""
    return draw(seed, index, {purpose: shape}, step=step)[purpose]


def uniform(seed: int, purpose: str, index: Tensor, shape: Shape = (), step: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float64, (B, *shape), for the images `index` (B,) int64."""
    count = math.prod(shape)
    units, _ = _units(seed, ((purpose, (count + 3) // 4),), index, step)
    return units.flip(0).permute(2, 3, 1, 0).flatten(1)[:, :count].reshape(len(index), *shape)


def integers(seed: int, purpose: str, index: Tensor, high: int, step: int = 0) -> Tensor:
    """Integers in 0 .. high - 1, int64, (B,)."""
    return below(uniform(seed, purpose, index, (), step), high)


def below(uniform: Tensor, high: int) -> Tensor:
    """Uniform numbers in (0, 1), at most 1 - 2^-33 as all here => integers in 0 .. high - 1, int64."""
    return (uniform * high).long()
