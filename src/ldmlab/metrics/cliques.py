"""Images that agree among themselves: cliques of the graph that joins those nearer than a distance."""

import torch
from torch import Tensor


def largest_clique(joined: Tensor) -> list[int]:
    """A largest set of nodes that are all joined, of a symmetric bool (N, N): branch and bound with a pivot.

    A largest clique holds the pivot or a node that is not joined to it (Bron & Kerbosch 1973, Tomita et al. 2006).
    """
    near = [{j for j, there in enumerate(row) if there and j != i} for i, row in enumerate(joined.tolist())]
    best: list[int] = []

    def grow(clique: list[int], left: set[int]) -> None:
        nonlocal best
        if len(clique) > len(best):
            best = clique
        if not left or len(clique) + len(left) <= len(best):
            return
        pivot = max(left, key=lambda node: len(near[node] & left))
        for node in sorted(left - near[pivot]):
            grow([*clique, node], left & near[node])
            left = left - {node}

    grow([], set(range(len(near))))
    return sorted(best)


def medoid(distances: Tensor, among: list[int]) -> int:
    """The one of `among` with the smallest sum of distances (N, N) to the others."""
    chosen = torch.tensor(among)
    return among[int(distances[chosen][:, chosen].sum(dim=1).argmin())]
