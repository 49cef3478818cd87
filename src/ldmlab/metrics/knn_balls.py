"""k-NN balls: squared radii, and the fraction of one set inside the balls of another; in tiles, each pair once.

With `screening` 8-bit products exclude pairs and float32 decides the rest (`screening.py`); the results are the same.
"""

import torch
from torch import Tensor

from ldmlab.metrics.screening import Block, Points, Space

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
