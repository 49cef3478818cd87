"""Intervals cover the true preference, rules leave sessions out, known values of the agreement."""

from dataclasses import replace

import numpy as np
import pytest

from ldmlab.errors import InputError
from ldmlab.study.answers import Session, excluded_by, preferences
from ldmlab.study.design import Item, Rules, Study

METHODS = {"a": "A", "b": "B"}


def study_of(items: int, checks: int = 0, methods: dict[str, str] = METHODS, **more: object) -> Study:
    names = tuple(methods)
    rated = [Item(f"{n:05d}", "item", names[:2], (f"{n}a.png", f"{n}b.png")) for n in range(items)]
    tests = [Item(f"{items + n:05d}", "check", ("whole", "damaged"), ("w.png", "d.png")) for n in range(checks)]
    return Study("t", 2, "?", methods, (*rated, *tests), per_session=items, **more)  # type: ignore[arg-type]


def session_of(study: Study, number: int, chosen: dict[str, str], seconds: float = 1.0) -> Session:
    order = study.of_session(number)
    found = Session(number, order)
    for item, swapped in order:
        choice = chosen.get(item.id, "whole")
        side = "right" if (choice == item.methods[1]) != swapped else "left"
        found.answers[item.id] = {"item": item.id, "chosen": choice, "side": side, "seconds": seconds}
    return found


def simulated(
    rng: np.random.Generator, raters: int, items: int, mean: float, spread: float
) -> tuple[Study, list[Session]]:
    """Raters and items with preferences of their own around the mean, on the log-odds scale."""
    study = study_of(items, seed=int(rng.integers(1 << 30)))
    by_rater, by_item = rng.normal(0, spread, raters), rng.normal(0, spread, items)
    sessions = []
    for rater in range(raters):
        p = 1 / (1 + np.exp(-(mean + by_rater[rater] + by_item)))
        votes = rng.random(items) < p
        chosen = {item.id: "b" if vote else "a" for item, vote in zip(study.rated, votes, strict=True)}
        sessions.append(session_of(study, rater, chosen))
    return study, sessions


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 1.2])
def test_the_interval_covers_the_truth_in_93_of_100_studies(mean: float) -> None:
    """The truth: the mean over all raters and items of the distribution, by a million draws."""
    rng = np.random.default_rng(5)
    truth = 100 * float(np.mean(1 / (1 + np.exp(-(mean + rng.normal(0, 0.8 * 2**0.5, 1_000_000))))))
    covered = 0
    for _ in range(100):
        study, sessions = simulated(rng, raters=16, items=24, mean=mean, spread=0.8)
        share = preferences(study, sessions, bootstraps=400).shares["a", "b"]
        covered += share.low <= truth <= share.high
        assert share.high - share.low < 45  # an interval of everything would cover too
    assert covered >= 93


def test_strengths_of_three_methods_follow_from_the_shares() -> None:
    """Wins of 3 to 1 between neighbours and 9 to 1 over two: log strengths log 3 apart."""
    names = {"a": "", "b": "", "c": ""}
    rates = {("a", "b"): 300, ("b", "c"): 300, ("a", "c"): 360}
    items = [
        Item(f"{n:05d}", "item", pair, ("x", "y"))
        for n, (pair, k) in enumerate((pair, k) for pair in rates for k in range(400))
    ]
    study = Study("t", 2, "?", names, tuple(items), per_session=1200)
    second = {item.id: item.methods[1] for item in items}
    for pair, won in rates.items():
        losers = [item.id for item in items if item.methods == pair][won:]
        second |= dict.fromkeys(losers, pair[0])
    found = preferences(study, [session_of(study, 0, second)], bootstraps=50)
    values = [found.strengths[name].value for name in names]
    np.testing.assert_allclose(values, [-np.log(3), 0, np.log(3)], atol=0.01)
    assert found.shares["a", "b"].value == pytest.approx(75)


def test_agreement_of_raters_who_always_agree_and_of_those_who_guess() -> None:
    study = study_of(40)
    chosen = {item.id: "ab"[n % 2] for n, item in enumerate(study.rated)}
    same = preferences(study, [session_of(study, n, chosen) for n in range(4)], bootstraps=10)
    assert (same.alpha, same.agreement) == (1.0, 1.0)
    rng = np.random.default_rng(0)
    guesses = [{item.id: "ab"[rng.integers(2)] for item in study.rated} for _ in range(60)]
    alpha = preferences(study, [session_of(study, n, one) for n, one in enumerate(guesses)], bootstraps=10).alpha
    assert alpha == pytest.approx(0, abs=0.03)


def test_alpha_of_a_published_example() -> None:
    """Krippendorff 2011, section A: two observers, ten items of 0 and 1, alpha = 0.095."""
    one, two = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    study = study_of(10)
    rows = [{item.id: "ab"[v] for item, v in zip(study.rated, values, strict=True)} for values in (one, two)]
    alpha = preferences(study, [session_of(study, n, row) for n, row in enumerate(rows)], bootstraps=10).alpha
    assert alpha == pytest.approx(0.095, abs=5e-4)


def test_rules_leave_sessions_out() -> None:
    study = study_of(24, checks=3)
    rng = np.random.default_rng(1)
    fair = {item.id: "ab"[rng.integers(2)] for item in study.rated}
    checks = [item.id for item in study.items if item.kind == "check"]
    assert excluded_by(study, session_of(study, 0, fair)) is None
    assert excluded_by(study, session_of(study, 0, fair | {checks[0]: "damaged"})) is None
    assert excluded_by(study, session_of(study, 0, fair | dict.fromkeys(checks, "damaged"))) == "attention checks"
    assert excluded_by(study, session_of(study, 0, fair, seconds=0.1)) == "too fast"
    lefts = {item.id: item.methods[swapped] for item, swapped in study.of_session(0) if item.kind == "item"}
    assert excluded_by(study, session_of(study, 0, lefts)) == "always one side"
    few = session_of(study, 0, fair)
    few.answers = dict(list(few.answers.items())[:5])
    assert excluded_by(study, few) == "too few answers"
    with pytest.raises(InputError, match="no session of the study counts \\(too few answers: 1\\)"):
        preferences(study, [few])
    assert excluded_by(replace(study, rules=Rules(least_answers=1, checks_wrong=3)), few) is None


def test_sessions_see_all_items_equally_often_and_sides_in_half_of_the_cases() -> None:
    study = replace(study_of(30, checks=2), per_session=7)
    orders = [study.of_session(number) for number in range(60)]
    counts = {item.id: 0 for item in study.rated}
    for order in orders:
        ids = [item.id for item, _ in order if item.kind == "item"]
        assert len(set(ids)) == 7
        for name in ids:
            counts[name] += 1
    assert max(counts.values()) - min(counts.values()) <= 4
    assert study.of_session(3) == orders[3]
    swapped = np.mean([swap for order in orders for _, swap in order])
    assert 0.4 < swapped < 0.6
