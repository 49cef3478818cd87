"""Proportions with 95 % intervals, of samples that come in groups, and differences of two."""

from dataclasses import dataclass

from torch import Tensor

_Z = 1.959964  # 97.5 % of the normal distribution


@dataclass(frozen=True)
class Proportion:
    """A proportion with Wilson's score interval (1927), which is no point at 0 and 1."""

    value: float
    low: float
    high: float
    count: float  # independent trials behind it

    @classmethod
    def of(cls, hits: Tensor) -> "Proportion":
        """Of independent trials, bool (N,)."""
        return cls._made(float(hits.double().mean()), len(hits))

    @classmethod
    def of_groups(cls, hits: Tensor) -> "Proportion":
        """Of trials in groups, bool (groups, each): n = p (1 - p) / Var, within groups .. groups * each.

        The effective number of trials of Korn & Graubard (1998); where all groups agree, it is that of the groups.
        """
        groups, each = hits.shape
        means = hits.double().mean(dim=1)
        value = float(means.mean())
        variance = float(means.var()) / groups if groups > 1 else 0.0
        count = value * (1 - value) / variance if variance > 0 else groups
        return cls._made(value, min(max(count, groups), groups * each))

    @classmethod
    def _made(cls, p: float, n: float) -> "Proportion":
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * (p * (1 - p) / n + _Z**2 / (4 * n**2)) ** 0.5
        return cls(p, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p), n)


def least_difference(a: Proportion, b: Proportion) -> float:
    """Lower end of the 95 % interval of a - b (Newcombe 1998, method 10)."""
    return a.value - b.value - ((a.value - a.low) ** 2 + (b.high - b.value) ** 2) ** 0.5
