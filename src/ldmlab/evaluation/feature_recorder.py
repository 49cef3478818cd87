"""Collects features of real images over batches and processes, whole or as sums, ready to be kept in a file."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ldmlab.evaluation.record import gathered
from ldmlab.metrics.frechet import FrechetDistance, whole

LARGEST_SET = 60_000  # images whose features are kept whole: 0.5 GB at 2048 floats; above it only sums are


class Recorder:
    """Collects what is said of this process's share; beyond LARGEST_SET only sums of features: memory stays bounded."""

    def __init__(self, names: Iterable[str] = ("features",)) -> None:
        self.names = tuple(names)  # of what is kept of every image
        self._rows: list[dict[str, Tensor]] = []
        self._numbers: list[Tensor] = []
        self._sums: FrechetDistance | None = None

    def add(self, said: Mapping[str, Tensor], index: Tensor) -> None:
        """Tensors (B, D) by name with the images' numbers (B,)."""
        self._rows.append({name: said[name].float().cpu() for name in self.names})
        self._numbers.append(index.cpu())
        if self._sums is not None or sum(map(len, self._numbers)) > LARGEST_SET:
            self._fold()

    def _fold(self) -> None:
        for rows in self._rows:
            self._sums = self._sums or FrechetDistance(rows["features"].shape[1])
            self._sums.update(rows["features"], real=True)
        self._rows, self._numbers = [], []

    def tensors(self) -> dict[str, Tensor]:
        """Of all processes together, what a file holds; empty if there was no image."""
        counts = gathered((sum(map(len, self._numbers)), self._sums is not None))
        if any(folded for _, folded in counts) or sum(count for count, _ in counts) > LARGEST_SET:
            self._fold()
            shares = [share for share in gathered(_sums(self._sums)) if share]
            return {name: sum(share[name] for share in shares[1:]) + shares[0][name] for name in shares[0]}
        mine = {name: torch.cat([rows[name] for rows in self._rows]) for name in self.names} if self._rows else {}
        found = [share for share in gathered(mine | {"index": torch.cat(self._numbers)} if mine else {}) if share]
        if not found:
            return {}
        together = {name: torch.cat([share[name] for share in found]) for name in found[0]}
        order = together["index"].argsort(stable=True)
        return {name: tensor[order].contiguous() for name, tensor in together.items()}


def _sums(metric: FrechetDistance | None) -> dict[str, Tensor]:
    if metric is None:
        return {}
    return {"count": metric.real_count, "sum": metric.real_sum, "outer": whole(metric.real_outer)}
