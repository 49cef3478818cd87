"""What a task's judges may look at, and what they say: real images with their annotations, samples, what was asked.

A judge learns from real training images alone, is measured on held-out real images, and then looks at samples.
The same samples beside what others were asked for say what chance is worth.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from ldmlab.evaluation.judge_training import Learned, Show

Fields = Mapping[str, Any]
Batches = Iterable[Fields]


@dataclass(frozen=True)
class Evidence:
    """Images are uint8 (3, H, W) each, with what lies on them; fields are those of the model's requests."""

    real: Callable[[str, tuple[str, ...]], Batches]  # split, more fields of KEY.json => its images, at sample size
    reference: str  # split that samples are compared with: train | val
    asked: Sequence[Fields]  # of each sample, the fields that the judge needs
    samples: Tensor  # uint8 (N, 3, H, W)
    seed: int = 0
    class_names: Sequence[str] = ()  # by class_id, where the data say
    track: Callable[[range, int, str], Iterable[int]] = lambda steps, count, title: steps

    def others(self) -> list[Fields]:
        """For each sample what another one was asked for, drawn among those that ask for something else."""
        order = list(range(len(self.asked)))
        random.Random(self.seed).shuffle(order)
        partner = dict(zip(order, order[1:] + order[:1], strict=True))
        return [self._other(place, partner) for place in range(len(order))]

    def shown(self, title: str) -> Show:
        """The updates of a judge that learns, to be shown under a title."""
        return lambda updates: self.track(updates, len(updates), title)

    def _other(self, place: int, partner: Mapping[int, int]) -> Fields:
        mine, other = self.asked[place], partner[place]
        while other != place and _same(mine, self.asked[other]):
            other = partner[other]
        return self.asked[other]


def _same(one: Fields, other: Fields) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in one)


@dataclass(frozen=True)
class ClassVerdict:
    """One class: the score on real images and on samples, None where nothing was asked; from how many each."""

    name: str
    real: float | None
    real_count: int
    samples: float | None
    samples_count: int


@dataclass(frozen=True)
class Verdict:
    """What a judge found; all values are shares in 0 .. 1, the higher the better."""

    measures: str  # in a few words
    how: str  # in a sentence or two, for the report
    samples: float
    held_out_real: float  # the judge's own limit
    shuffled: float  # the same samples beside what others were asked for
    chance: float | None  # of blind guessing; None: `shuffled` is the only measure of it
    classes: Sequence[ClassVerdict] = field(default_factory=list)
    learned: Learned | None = None  # None: a judge that does not learn

    @property
    def of_real(self) -> float | None:
        """Samples over real images."""
        return self.samples / self.held_out_real if self.held_out_real else None

    @property
    def times_chance(self) -> float | None:
        """Samples over blind guessing, or over exchanged requests where that is not known."""
        base = self.shuffled if self.chance is None else self.chance
        return self.samples / base if base else None


class Judge(Protocol):
    """Looks once at everything."""

    needs: ClassVar[frozenset[str]]  # fields of a request it judges by

    def __call__(self, evidence: Evidence) -> Verdict: ...


class Baseline(Protocol):
    """A way to answer the same requests without a model."""

    needs: ClassVar[frozenset[str]]  # fields of a request it starts from
    title: ClassVar[str]

    def learn(self, real: Batches) -> None:
        """Training images, for those that copy from them."""

    def __call__(self, asked: Sequence[Fields]) -> Tensor:
        """uint8 (B, 3, H, W)."""
        ...
