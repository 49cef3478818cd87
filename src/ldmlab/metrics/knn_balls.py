"""k-NN balls: squared radii, and the fraction of one set inside the balls of another; in tiles, each pair once.

With `screening` products of 8-bit integers exclude most pairs and float32 decides the rest; the results are the same.
With x = x~ + e(x), x~ = s q, q in [-127, 127]^D, the product q_x . q_y is exact in 32-bit integers, and

    2 |x . y - s_x s_y q_x . q_y| <= 2 |e(x)| |y~| + 2 |x| |e(y)| + 2^-11 |x| |y| <= E(x) + E(y)
    E(x) = |e(x)|^2 / r + (r + 2^-12) |x|^2,  r > 0

(Cauchy and Schwarz, with a part for what float32 does to the rest; then 2 a b <= a^2 / r + r b^2, which loses nothing
where |e| = r |x|). A pair whose screened distance is beyond a threshold by more than that is beyond it.
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


_TILE = 2048  # rows and columns of one block of distances: 16 MiB in float32
_STEP = 256  # rows are left out of a block by so many: matrix products of every size would each keep memory
_WORTH = 0.7  # share of a block beneath which leaving rows out pays for gathering the others


def squared_radii(points: Tensor, neighbours: int, screening: bool = False) -> Tensor:
    """Squared distance (n,) of each point to its k-th nearest other point."""
    known = Points.of(points, screening)
    parts = [known.part(slice(start, start + _TILE)) for start in range(0, len(points), _TILE)]
    best = [_within(part.exact, neighbours) for part in parts]  # (n, k), ascending
    space = Space(_TILE, known)
    for top, a in enumerate(parts):
        for left in range(top + 1, len(parts)):
            block = Block(a, parts[left], space)
            pairs = block.near(best[top][:, -1], best[left][:, -1])
            found = block.distances(pairs)
            best[top] = _merged(best[top], pairs[:, 0], found)
            best[left] = _merged(best[left], pairs[:, 1], found)
    return torch.cat([part[:, -1] for part in best])


def _within(points: Tensor, neighbours: int) -> Tensor:
    """The k smallest distances (n, k) of each point to others of its own tile; inf where there are too few."""
    own = Points.of(points, screening=False)
    distances = Block(own, own, Space(len(points), own)).bounds().clamp_min_(0).fill_diagonal_(torch.inf)
    close = distances.topk(min(neighbours, len(points)), dim=1, largest=False).values
    return torch.nn.functional.pad(close, (0, neighbours - close.shape[1]), value=torch.inf)


def _merged(best: Tensor, rows: Tensor, found: Tensor) -> Tensor:
    """The k smallest of each row's (n, k) and of the distances (P,) found for some rows (P,)."""
    count = best.shape[1]
    order = found.argsort()
    order = order[rows[order].argsort(stable=True)]  # by row, then by distance
    rows, found = rows[order], found[order].clamp_min(0)
    place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)  # rank within its row
    few = place < count
    new = torch.full_like(best, torch.inf)
    new[rows[few], place[few]] = found[few]
    return torch.cat([best, new], dim=1).topk(count, dim=1, largest=False).values


def shares_inside(
    a: Tensor, ball_a: Tensor, b: Tensor, ball_b: Tensor, screening: bool = False
) -> tuple[Tensor, Tensor]:
    """Fraction of the points `a` in at least one ball of `b` (surface included), and of `b` in one of `a`; float64.

    Pairs of which both points are known to be inside are skipped.
    """
    known_a, known_b = Points.of(a, screening), Points.of(b, screening)
    a_inside = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    b_inside = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    space = Space(_TILE, known_a)
    for rows in torch.arange(len(a), device=a.device).split(_TILE):
        for columns in torch.arange(len(b), device=b.device).split(_TILE):
            for i, j in _open_pairs(rows, columns, ~a_inside[rows], ~b_inside[columns]):
                block = Block(known_a.part(_span(i)), known_b.part(_span(j)), space)
                a_inside[i[_inside(block, ball_b[j], a_inside[i], axis=0)]] = True
                b_inside[j[_inside(block, ball_a[i], b_inside[j], axis=1)]] = True
    return a_inside.double().mean(), b_inside.double().mean()


def _open_pairs(rows: Tensor, columns: Tensor, open_rows: Tensor, open_columns: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Rows and columns of blocks that hold every pair of a tile of which one point is open, (n,) and (m,)."""
    part_rows, part_columns = open_rows.float().mean().item(), open_columns.float().mean().item()
    if part_rows + (1 - part_rows) * part_columns > _WORTH:
        return [(rows, columns)]
    some_rows, other_rows = _split(rows, open_rows)
    some_columns, _ = _split(columns, open_columns)
    blocks = [(some_rows, columns), (other_rows, some_columns)]
    return [(i, j) for i, j in blocks if len(i) and len(j)]


def _split(points: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """The selected points, with some others up to a multiple of the step, and the rest."""
    count = min(-(-int(selected.sum()) // _STEP) * _STEP, len(points))
    order = points[selected.byte().argsort(descending=True)]
    return order[:count], order[count:]


def _span(points: Tensor) -> Tensor | slice:
    """Neighbouring points as a slice, which copies nothing."""
    first, last = int(points[0]), int(points[-1])
    return slice(first, last + 1) if last - first + 1 == len(points) else points


def _inside(block: Block, balls: Tensor, known: Tensor, axis: int) -> Tensor:
    """Rows of a block (axis 0) in a ball around a column, or columns (axis 1) in one around a row, but the known."""
    points = block.columns(balls) if axis else block.rows(balls)
    points = points[~known[points]]
    if not block.screened or len(points) == 0:
        return points
    chosen = (slice(None), points) if axis else (points, slice(None))
    bounds = block.bounds(*chosen)
    upper = block.upper_bounds(bounds, *chosen)
    bounds, upper = (bounds.T, upper.T) if axis else (bounds, upper)  # by point, then by ball
    sure = (upper <= balls).any(dim=1)
    near = (bounds[~sure] <= balls).nonzero()
    pairs = torch.stack([points[~sure][near[:, 0]], near[:, 1]], dim=1)
    hits = block.distances(pairs.flip(1) if axis else pairs) <= balls[pairs[:, 1]]
    return torch.cat([points[sure], pairs[hits, 0]])
