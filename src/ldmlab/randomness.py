"""Random numbers that belong to an image, not to a batch or a process.

Every number is a pure function of (seed, purpose, index of the image, step, element): Philox 4x32 with ten rounds
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), computed with integer tensors on any device,
so that splitting the work over batches, processes or devices cannot change a single bit of it.
"""

import math
import zlib

import torch
from torch import Tensor

from ldmlab.errors import InputError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words per counter (int64 tensors of one broadcast shape holding values below 2^32)."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in halves so that int64 never overflows."""
    low = (word & 0xFFFF) * factor  # below 2^48
    high = (word >> 16) * factor + (low >> 16)  # below 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _words(seed: int, purpose: str, index: Tensor, step: int, count: int) -> Tensor:
    """At least `count` words per image, rounded up to a multiple of four: (B, 4 ceil(count / 4))."""
    if not 0 <= seed < 2**64:
        raise InputError(f"seed={seed} is outside 0 .. 2^64 - 1; choose a non-negative integer.")
    block = torch.arange((count + 3) // 4, device=index.device)[None, :]
    stream = torch.tensor(zlib.crc32(purpose.encode()), device=index.device)
    step_word = torch.tensor(step, device=index.device)
    words = philox((block, index[:, None] & _MASK, step_word, stream), seed)
    return torch.stack(words, dim=-1).flatten(1)


def uniform(seed: int, purpose: str, index: Tensor, shape: tuple[int, ...] = (), step: int = 0) -> Tensor:
    """Uniform numbers in (0, 1), float64, (B, *shape), for the images `index` (B,) int64."""
    count = math.prod(shape)
    words = _words(seed, purpose, index, step, count)[:, :count]
    return ((words.double() + 0.5) / 2**32).reshape(len(index), *shape)


def normal(seed: int, purpose: str, index: Tensor, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """Standard normal numbers, float32, (B, *shape), by Box and Muller.

    The transform runs in float64, so that vector units of other widths, which may differ in its last bit, round to
    the same float32.
    """
    count = math.prod(shape)
    words = _words(seed, purpose, index, step, count + count % 2)
    pairs = ((words.double() + 0.5) / 2**32).unflatten(1, (-1, 2))
    radius, angle = torch.sqrt(-2 * torch.log(pairs[..., 0])), 2 * math.pi * pairs[..., 1]
    values = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1).flatten(1)
    return values[:, :count].float().reshape(len(index), *shape)


def integers(seed: int, purpose: str, index: Tensor, high: int, step: int = 0) -> Tensor:
    """Integers in 0 .. high - 1, int64, (B,)."""
    return (uniform(seed, purpose, index, (), step) * high).long().clamp_max(high - 1)
