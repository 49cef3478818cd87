"""Low-precision screening of distances: products of 8-bit integers exclude most pairs, float32 decides the rest.

With x = x~ + e(x), x~ = s q, q in [-127, 127]^D, the product q_x . q_y is exact in 32-bit integers, and

    2 |x . y - s_x s_y q_x . q_y| <= 2 |e(x)| |y~| + 2 |x| |e(y)| + 2^-11 |x| |y| <= E(x) + E(y)
    E(x) = |e(x)|^2 / r + (r + 2^-12) |x|^2,  r > 0

(Cauchy and Schwarz, with a part for what float32 does to the rest; then 2 a b <= a^2 / r + r b^2, which loses nothing
where |e| = r |x|). A pair whose screened distance is beyond a threshold by more than that is beyond it; all others are
computed again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_CHUNK = 1024  # rows that are worked on at a time: 8 MiB at 2048 features
_PAIRS = 64  # pairs of rows that are worked on at a time: they stay in the cache
_GROUP = 64  # values that are first compared by their least
_ROUNDING = 2.0**-12
_LARGEST = 127
_RATIO = 2.0**-6  # r; the same for all points, so that errors of two points add up
_REACHES = (4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 24.0)  # of an 8-bit number, in root mean squares of the features
_SMALLEST = 1e-30  # features of zeros alone have a scale too
_ALIGNED = 32  # rows and features of 8-bit products come in multiples: GPUs multiply no others


@dataclass(frozen=True)
class Low:
    """8-bit approximation of points (N, D), scale q, with a bound on its error."""

    q: Tensor  # 8-bit integers, (N, D), D rounded up
    scale: float
    error: Tensor  # (N,) E(x)

    @staticmethod
    def of(exact: Tensor, squares: Tensor) -> "Low":
        """Features beyond the range of 8 bits are clipped, and the clipped part counts as error."""
        scale = _best_scale(exact[:_CHUNK])
        q = torch.cat([_rounded(rows, scale).to(torch.int8) for rows in exact.split(_CHUNK)])
        rows = zip(exact.split(_CHUNK), q.split(_CHUNK), strict=True)
        lost = torch.cat([(a - b * scale).norm(dim=1) for a, b in rows])
        length = squares.sqrt() + lost  # at least |x| and |x~|
        error = lost.square() / _RATIO + (_RATIO + _ROUNDING) * length.square()
        return Low(pad(q, (0, -q.shape[1] % _ALIGNED)), scale, error)


def _best_scale(rows: Tensor) -> float:
    """The scale with the least error on some rows."""
    size = rows.square().mean().sqrt().clamp_min(_SMALLEST)
    scales = [float(size * reach / _LARGEST) for reach in _REACHES]
    return min(scales, key=lambda scale: float((rows - _rounded(rows, scale) * scale).norm(dim=1).mean()))


def _rounded(rows: Tensor, scale: float) -> Tensor:
    """Rounded to the nearest of 255 levels."""
    return (rows / scale).round_().clamp_(-_LARGEST, _LARGEST)


@dataclass(frozen=True)
class Points:
    """Points (N, D) in float32, and their approximation for screening."""

    exact: Tensor
    squares: Tensor  # (N,) |x|^2
    low: Low | None = None

    @staticmethod
    def of(exact: Tensor, screening: bool) -> "Points":
        """`exact` is not copied."""
        squares = torch.cat([rows.square().sum(dim=1) for rows in exact.split(_CHUNK)])
        return Points(exact, squares, Low.of(exact, squares) if screening else None)

    def __len__(self) -> int:
        return len(self.exact)

    def part(self, rows: slice | Tensor) -> "Points":
        low = self.low and Low(self.low.q[rows], self.low.scale, self.low.error[rows])
        return Points(self.exact[rows], self.squares[rows], low)


class Space:
    """Memory of one block, which the next overwrites: fresh memory would cost as much as the work in it."""

    def __init__(self, size: int, like: Points) -> None:
        side = size + (0 if like.low is None else -size % _ALIGNED)
        kind = like.exact.dtype if like.low is None else torch.int32
        self._products = torch.empty(side * side, dtype=kind, device=like.exact.device)
        self._sums = like.exact.new_empty(size * size)

    def products(self, a: Tensor, b: Tensor) -> Tensor:
        """a b^T, (n, m)."""
        if a.dtype != torch.int8:
            return torch.matmul(a, b.T, out=self._products[: len(a) * len(b)].view(len(a), len(b)))
        rows, columns = _aligned(a), _aligned(b)
        out = self._products[: len(rows) * len(columns)].view(len(rows), len(columns))
        return torch._int_mm(rows, columns.T, out=out)[: len(a), : len(b)]

    def sums(self, known: Tensor, products: Tensor, factor: float) -> Tensor:
        """known (n, 1) or (m,) + factor products (n, m)."""
        out = self._sums[: products.numel()].view(products.shape)
        numbers = products if products.is_floating_point() else out.copy_(products)  # one pass for both is slower
        return torch.add(known, numbers, alpha=factor, out=out)


def _aligned(rows: Tensor) -> Tensor:
    """With rows of zeros where some are missing."""
    missing = -len(rows) % _ALIGNED
    return pad(rows, (0, 0, 0, missing)) if missing else rows


class Block:
    """Squared distances of some points (n) to others (m), or lower bounds of them: left + right + factor products."""

    def __init__(self, a: Points, b: Points, space: Space) -> None:
        self.a, self.b, self.space = a, b, space
        self.left, self.right, self.factor = a.squares, b.squares, -2.0
        self.screened = a.low is not None and b.low is not None
        if a.low is None or b.low is None:
            self.products = space.products(a.exact, b.exact)
        else:
            self.products, self.factor = space.products(a.low.q, b.low.q), -2 * a.low.scale * b.low.scale
            self.left, self.right = a.squares - a.low.error, b.squares - b.low.error

    def bounds(self, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)) -> Tensor:
        """Of some rows and columns."""
        known = self.left[rows, None] + self.right[columns]
        return torch.add(known, self.products[rows][:, columns], alpha=self.factor)

    def upper_bounds(
        self, lower: Tensor, rows: Tensor | slice = slice(None), columns: Tensor | slice = slice(None)
    ) -> Tensor:
        left, right = 2 * (self.a.squares - self.left), 2 * (self.b.squares - self.right)
        return lower + left[rows, None] + right[columns]

    def near(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Pairs (P, 2), by row, with a bound <= the limit of their row (n,) or of their column (m,)."""
        of_rows = _beneath(self.space.sums(self.right, self.products, self.factor), rows - self.left)
        of_columns = _beneath(self.space.sums(self.right - columns, self.products, self.factor), -self.left)
        places = torch.cat([of_rows, of_columns]).unique()
        return torch.stack([places // len(self.b), places % len(self.b)], dim=1)

    def rows(self, balls: Tensor) -> Tensor:
        """Rows with a bound <= the ball of its column (m,), found without comparing all bounds."""
        least = self.space.sums(self.right - balls, self.products, self.factor).amin(dim=1)
        return (least <= -self.left).nonzero()[:, 0]

    def columns(self, balls: Tensor) -> Tensor:
        """Columns with a bound <= the ball of its row (n,)."""
        least = self.space.sums((self.left - balls)[:, None], self.products, self.factor).amin(dim=0)
        return (least <= -self.right).nonzero()[:, 0]

    def distances(self, pairs: Tensor) -> Tensor:
        """Exactly, of pairs (P, 2)."""
        if not self.screened:
            rows, columns = pairs.unbind(dim=1)
            return self.left[rows] + self.right[columns] - 2 * self.products[rows, columns]
        a, b = self.a.exact, self.b.exact
        parts = zip(pairs[:, 0].split(_PAIRS), pairs[:, 1].split(_PAIRS), strict=True)
        chunks = [(a.index_select(0, i) - b.index_select(0, j)).square_().sum(dim=1) for i, j in parts]
        return torch.cat(chunks) if chunks else a.new_empty(0)


def _beneath(values: Tensor, limits: Tensor) -> Tensor:
    """Places i m + j of values (n, m) that are <= the limit of their row (n,): few, so groups of them come first."""
    count = _GROUP if values.shape[1] % _GROUP == 0 else values.shape[1]
    groups = values.view(-1, count)
    limits = limits.repeat_interleave(len(groups) // len(limits))
    some = (groups.amin(dim=1) <= limits).nonzero()[:, 0]
    near = (groups.index_select(0, some) <= limits[some, None]).nonzero()
    return some[near[:, 0]] * count + near[:, 1]
