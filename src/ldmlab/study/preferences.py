"""Preferences with intervals from the answers of many raters to many items.

    share of a method   answers that chose it / answers to pairs with it
    Bradley-Terry       P(a preferred to b) = 1 / (1 + exp(s_b - s_a)), sum of s = 0 (Bradley & Terry 1952)
    agreement           Krippendorff's alpha of nominal values (Krippendorff 2011): 1 - D_observed / D_expected
Intervals: bootstrap in which raters and items are both drawn with replacement (Owen 2007), 2.5 % and 97.5 %. It counts
the noise of a single answer in both directions and is therefore somewhat wide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ldmlab.errors import InputError
from ldmlab.study.answers import Session
from ldmlab.study.design import Study

BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Preferences:
    """The results of a study."""

    raters: int
    answers: int
    excluded: Mapping[str, int]  # rule: sessions
    shares: Mapping[tuple[str, str], Interval]  # (a, b): percent of their pairs in which b was chosen
    strengths: Mapping[str, Interval]  # Bradley-Terry's s
    alpha: float | None  # None: no item has two answers
    agreement: float | None  # share of pairs of answers to one item that are equal


def excluded_by(study: Study, session: Session) -> str | None:
    """The first rule that leaves the session out."""
    kind, rules = {item.id: item.kind for item in study.items}, study.rules
    answers = [answer for answer in session.answers.values() if kind[answer["item"]] == "item"]
    if len(answers) < min(rules.least_answers, len(study.rated)):
        return "too few answers"
    checks = [answer for answer in session.answers.values() if kind[answer["item"]] == "check"]
    if sum(answer["chosen"] != "whole" for answer in checks) > rules.checks_wrong:
        return "attention checks"
    if float(np.median([answer["seconds"] for answer in answers])) < rules.median_seconds:
        return "too fast"
    left = sum(answer["side"] == "left" for answer in answers) / len(answers)
    if len(answers) >= 20 and max(left, 1 - left) > rules.one_side:
        return "always one side"
    return None


def preferences(study: Study, sessions: Sequence[Session], bootstraps: int = BOOTSTRAPS) -> Preferences:
    """Shares, strengths and agreement of the sessions that no rule leaves out; InputError where none is left."""
    reasons = [excluded_by(study, session) for session in sessions]
    kept = [session for session, why in zip(sessions, reasons, strict=True) if why is None]
    excluded = {why: reasons.count(why) for why in dict.fromkeys(reasons) if why is not None}
    if not kept:
        rules = ", ".join(f"{why}: {count}" for why, count in excluded.items()) or "none has begun"
        raise InputError(f"no session of the study counts ({rules}); wait for more answers.")
    seen, chosen, pairs = _matrices(study, kept)
    rng = np.random.default_rng(study.seed)
    raters, items = seen.shape
    weights = [(np.ones(raters), np.ones(items))]  # the estimate, then its bootstraps
    for _ in range(bootstraps):
        weights.append((_drawn(rng, raters), _drawn(rng, items)))
    names = list(study.methods)
    wins = np.stack([_wins(seen, chosen, pairs, names, *each) for each in weights])  # (1 + n, methods, methods)
    shares = {}
    for a, b in dict.fromkeys(pairs):
        i, j = names.index(a), names.index(b)
        with np.errstate(invalid="ignore"):
            shares[a, b] = _interval(100 * wins[:, j, i] / (wins[:, j, i] + wins[:, i, j]))
    strengths = _bradley_terry(wins)
    alpha, agreement = _agreement(seen, chosen)
    by_name = {name: _interval(strengths[:, k]) for k, name in enumerate(names)}
    return Preferences(len(kept), int(seen.sum()), excluded, shares, by_name, alpha, agreement)


def _matrices(study: Study, sessions: Sequence[Session]) -> tuple[np.ndarray, np.ndarray, list[tuple[str, str]]]:
    """Raters x items: whether there is an answer, whether it chose the second method; and each item's methods."""
    rated = study.rated
    column = {item.id: number for number, item in enumerate(rated)}
    seen, chosen = np.zeros((2, len(sessions), len(rated)))
    for row, session in enumerate(sessions):
        for answer in session.answers.values():
            if (number := column.get(answer["item"])) is not None:
                seen[row, number] = 1
                chosen[row, number] = answer["chosen"] == rated[number].methods[1]
    return seen, chosen, [item.methods for item in rated]


def _drawn(rng: np.random.Generator, count: int) -> np.ndarray:
    """How often each of `count` is drawn with replacement."""
    return np.bincount(rng.integers(count, size=count), minlength=count).astype(float)


def _wins(
    seen: np.ndarray,
    chosen: np.ndarray,
    pairs: Sequence[tuple[str, str]],
    names: Sequence[str],
    rater: np.ndarray,
    item: np.ndarray,
) -> np.ndarray:
    """(methods, methods): weighted answers in which the row was preferred to the column."""
    total, second = rater @ seen * item, rater @ chosen * item  # (items,)
    first_of, second_of = (np.array([names.index(pair[side]) for pair in pairs]) for side in (0, 1))
    wins = np.zeros((len(names), len(names)))
    np.add.at(wins, (second_of, first_of), second)
    np.add.at(wins, (first_of, second_of), total - second)
    return wins


def _interval(values: np.ndarray) -> Interval:
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Interval(float(values[0]), float(low), float(high))


def _bradley_terry(wins: np.ndarray, steps: int = 200) -> np.ndarray:
    """(n, methods) log strengths by Hunter's minorisation (2004); half a win each way keeps them finite."""
    methods = wins.shape[1]
    compared = (wins.sum(0) + wins.sum(0).T) > 0
    wins = wins + 0.5 * compared
    games, won = wins + wins.swapaxes(1, 2), wins.sum(2)
    strength = np.ones((len(wins), methods))
    for _ in range(steps):
        strength = won / (games / (strength[:, :, None] + strength[:, None, :])).sum(2)
        strength /= np.exp(np.log(strength).mean(1, keepdims=True))
    return np.log(strength)


def _agreement(seen: np.ndarray, chosen: np.ndarray) -> tuple[float | None, float | None]:
    """Krippendorff's alpha, and the share of equal pairs of answers to one item."""
    total, second = seen.sum(0), chosen.sum(0)
    several = total >= 2
    n, ones = total[several], second[several]
    if not len(n):
        return None, None
    unequal = 2 * ones * (n - ones)  # ordered pairs of unequal answers
    observed = float((unequal / (n - 1)).sum() / n.sum())
    every, all_ones = n.sum(), ones.sum()
    expected = float(2 * all_ones * (every - all_ones) / (every * (every - 1)))
    agreement = 1 - float(unequal.sum() / (n * (n - 1)).sum())
    return (1 - observed / expected if expected else None), agreement
