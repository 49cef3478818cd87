"""Low-precision screening of distances: bfloat16 products rule out nearly every pair, float32 decides the rest.

With x = x~ + e(x), x~ in bfloat16, the product of two rows is known within

    |x . y - fl(x~ . y~)| <= |e(x)| |y| + |x| |e(y)| + 2^-8 |x| |y|

(Cauchy and Schwarz; the last term holds the rounding of the product itself, twice, so that float32 sums fit in too). A
pair whose screened distance is beyond a threshold by more than that is beyond it; all others are computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1024  # rows, or pairs of rows, that are worked on at a time: 16 MiB at 2048 features
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
        squares = exact.square().sum(dim=1)
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


class Block:
    """Squared distances of some points (n) to others (m), or lower bounds of them: left + right - 2 products."""

    def __init__(self, a: Points, b: Points) -> None:
        self.a, self.b = a, b
        self.left, self.right = a.squares, b.squares
        self.slack: Tensor | None = None  # (n,) by how much a bound may be too low; None: they are the distances
        if a.low is None or b.low is None or a.length is None or b.length is None or a.lost is None or b.lost is None:
            self.products = a.exact @ b.exact.T
        else:
            length, lost = b.length.max(), b.lost.max()
            error = 2 * (a.lost * length + a.length * (lost + _ROUNDING * length))
            self.left, self.slack = self.left - error, 2 * error
            self.products = a.low @ b.low.T

    def bounds(self, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> Tensor:
        """Of some rows and columns."""
        known = self.left[rows, None] + self.right[columns]
        return torch.add(known, self.products[rows][:, columns], alpha=-2)

    def rows(self, limit: Tensor | float, offset: Tensor | None = None) -> Tensor:
        """Rows r that have a bound with bound + offset (m,) <= limit (n,), found without comparing all bounds."""
        right = self.right if offset is None else self.right + offset
        least = torch.add(right, self.products, alpha=-2).amin(dim=1)
        return (least <= limit - self.left).nonzero()[:, 0]

    def columns(self, limit: Tensor | float, offset: Tensor | None = None) -> Tensor:
        """Columns that have a bound with bound + offset (n,) <= limit (m,)."""
        left = self.left if offset is None else self.left + offset
        least = torch.add(left[:, None], self.products, alpha=-2).amin(dim=0)
        return (least <= limit - self.right).nonzero()[:, 0]

    def distances(self, pairs: Tensor) -> Tensor:
        """Exactly, of pairs (P, 2)."""
        if self.slack is None:
            rows, columns = pairs.unbind(dim=1)
            return self.left[rows] + self.right[columns] - 2 * self.products[rows, columns]
        a, b = self.a.exact, self.b.exact
        chunks = [(a[some[:, 0]] - b[some[:, 1]]).square().sum(dim=1) for some in pairs.split(_CHUNK)]
        return torch.cat(chunks) if chunks else a.new_empty(0)
