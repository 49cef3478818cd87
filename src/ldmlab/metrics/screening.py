"""Low-precision screening of distances: bfloat16 products rule out nearly every pair, float32 decides the rest.

With x = x~ + e(x), x~ in bfloat16, and p = fl(x~ . y~) as computed, the product of two rows is known within

    |x . y - p| <= |e(x)| |y| + |x| |e(y)| + 2^-12 |x| |y| + 2^-8 |p|

(Cauchy and Schwarz, then the float32 sum over fewer than 2^12 features, then its rounding to bfloat16). A pair whose
screened distance is beyond a threshold by more than that is beyond it; all others are computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024  # rows that are worked on at a time: 8 MiB at 2048 features
_PAIRS = 64  # pairs of rows that are worked on at a time: they stay in the cache
_SUMMING = 2.0**-12
_ROUNDING = 2.0**-8


@dataclass(frozen=True)
class Points:
    """Points (N, D) in float32, and for screening their bfloat16 (N, D) with what it lost."""

    exact: Tensor
    squares: Tensor  # (N,) |x|^2
    low: Tensor | None = None
    length: Tensor | None = None  # (N,) |x|, of x~ too
    lost: Tensor | None = None  # (N,) |e(x)|

    @staticmethod
    def of(exact: Tensor, screening: bool) -> "Points":
        """`exact` is not copied."""
        squares = torch.cat([rows.square().sum(dim=1) for rows in exact.split(_CHUNK)])
        if not screening:
            return Points(exact, squares)
        low = exact.bfloat16()
        rows = zip(exact.split(_CHUNK), low.split(_CHUNK), strict=True)
        lost = torch.cat([(a - b.float()).norm(dim=1) for a, b in rows])
        return Points(exact, squares, low, squares.sqrt() + lost, lost)

    def __len__(self) -> int:
        return len(self.exact)

    def part(self, rows: slice | Tensor) -> "Points":
        """Some of them."""
        low, length, lost = (None if part is None else part[rows] for part in (self.low, self.length, self.lost))
        return Points(self.exact[rows], self.squares[rows], low, length, lost)


class Space:
    """Memory of one block, which the next overwrites: fresh memory would cost as much as the work in it."""

    def __init__(self, size: int, like: Points) -> None:
        kind = like.exact if like.low is None else like.low
        self._products = kind.new_empty(size * size)
        self._sums = like.exact.new_empty(size * size)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T, (n, m)."""
        return torch.matmul(a, b.T, out=self._products[: len(a) * len(b)].view(len(a), len(b)))

    def sums(self, products: Tensor, known: Tensor) -> Tensor:
        """known (n, 1) or (m,) - 2 products (n, m)."""
        return torch.add(known, products, alpha=-2, out=self._sums[: products.numel()].view(products.shape))


class Block:
    """Squared distances of some points (n) to others (m), or lower bounds of them: left + right - 2 products."""

    def __init__(self, a: Points, b: Points, space: Space) -> None:
        self.a, self.b, self.space = a, b, space
        self.left, self.right = a.squares, b.squares
        self.slack: Tensor | None = None  # (n,) by how much a bound may be too low; None: they are the distances
        if a.low is None or b.low is None or a.length is None or b.length is None or a.lost is None or b.lost is None:
            self.products = space.products(a.exact, b.exact)
        else:
            self.products = space.products(a.low, b.low)
            length, lost = b.length.max(), b.lost.max()
            largest = torch.maximum(self.products.amax(dim=1), -self.products.amin(dim=1)).float()
            error = 2 * (a.lost * length + a.length * (lost + _SUMMING * length) + _ROUNDING * largest)
            self.left, self.slack = self.left - error, 2 * error

    def bounds(self, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> Tensor:
        """Of some rows and columns."""
        known = self.left[rows, None] + self.right[columns]
        return torch.add(known, self.products[rows][:, columns], alpha=-2)

    def rows(self, limit: Tensor | float, offset: Tensor | None = None) -> Tensor:
        """Rows r that have a bound with bound + offset (m,) <= limit (n,), found without comparing all bounds."""
        right = self.right if offset is None else self.right + offset
        least = self.space.sums(self.products, right).amin(dim=1)
        return (least <= limit - self.left).nonzero()[:, 0]

    def columns(self, limit: Tensor | float, offset: Tensor | None = None) -> Tensor:
        """Columns that have a bound with bound + offset (n,) <= limit (m,)."""
        left = self.left if offset is None else self.left + offset
        least = self.space.sums(self.products, left[:, None]).amin(dim=0)
        return (least <= limit - self.right).nonzero()[:, 0]

    def distances(self, pairs: Tensor) -> Tensor:
        """Exactly, of pairs (P, 2)."""
        if self.slack is None:
            rows, columns = pairs.unbind(dim=1)
            return self.left[rows] + self.right[columns] - 2 * self.products[rows, columns]
        a, b = self.a.exact, self.b.exact
        chunks = [(a[some[:, 0]] - b[some[:, 1]]).square_().sum(dim=1) for some in pairs.split(_PAIRS)]
        return torch.cat(chunks) if chunks else a.new_empty(0)
