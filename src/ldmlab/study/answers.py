"""The answers of a study, and preferences with intervals from those of many raters to many items.

Answers are a file to which lines are only added, each on disk before the rater goes on. A session belongs to a random
name that its browser keeps; nothing about the person is stored. A line cut by a killed server is left out, and its item
is put again.

    share of a method   answers that chose it / answers to pairs with it
    Bradley-Terry       P(a preferred to b) = 1 / (1 + exp(s_b - s_a)), sum of s = 0 (Bradley & Terry 1952)
    agreement           Krippendorff's alpha of nominal values (Krippendorff 2011): 1 - D_observed / D_expected
Intervals: bootstrap in which raters and items are both drawn with replacement (Owen 2007), 2.5 % and 97.5 %. It counts
the noise of a single answer in both directions and is therefore somewhat wide.
"""

import errno
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ldmlab.disks import disk_errors, open_regular
from ldmlab.errors import InputError
from ldmlab.study.design import Item, Study

FILE = "answers.jsonl"
_LONGEST_SECONDS = 3600.0
_SIDES = ("left", "right")


def _is_time(seconds: Any) -> bool:
    return isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= _LONGEST_SECONDS


class Refused(Exception):
    """A request that does not fit the session; `status` is HTTP's."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


@dataclass
class Session:
    """One rater's items and answers."""

    number: int
    order: list[tuple[Item, bool]]
    answers: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def next(self) -> tuple[Item, bool] | None:
        """The first item without an answer; None at the end."""
        return next(((item, swapped) for item, swapped in self.order if item.id not in self.answers), None)


class Answers:
    """Sessions of a study, read from and added to FOLDER/answers.jsonl."""

    def __init__(self, folder: Path, study: Study, most_sessions: int = 10_000) -> None:
        self.path, self.study, self.most_sessions = folder / FILE, study, most_sessions
        self.sessions: dict[str, Session] = {}
        try:
            with open_regular(self.path) as file:
                content = file.readall()
        except FileNotFoundError:
            content = b""
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({error}); repair it, or make the study again.") from error
        self._torn = bool(content) and not content.endswith(b"\n")
        self.damaged = sum(not self._take(line) for line in content.splitlines() if line)  # left out

    def _take(self, line: bytes) -> bool:
        """Whether a line could be read; a kill may have cut it."""
        try:
            event = json.loads(line)
            if event["kind"] == "start":
                self.sessions[event["session"]] = Session(event["number"], self.study.of_session(event["number"]))
                return True
            session = self.sessions[event["session"]]
            item = next(item for item, _ in session.order if item.id == event["item"])
            fits = event["chosen"] in item.methods and event["side"] in _SIDES and _is_time(event["seconds"])
            if fits:
                session.answers.setdefault(item.id, event)
            return fits
        except (ValueError, KeyError, TypeError, StopIteration):
            return False

    def _add(self, event: Mapping[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        with disk_errors(self.path):
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                content, self._torn = b"\n" + line if self._torn else line, True
                if os.write(handle, content) < len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(handle)
            finally:
                os.close(handle)
        self._torn = False

    def start(self) -> str:
        """A new session's name, after the consent."""
        if len(self.sessions) >= self.most_sessions:
            raise Refused(503, "the study has as many sessions as it takes")
        name, number = secrets.token_urlsafe(16), len(self.sessions)
        self._add({"kind": "start", "session": name, "number": number})
        self.sessions[name] = Session(number, self.study.of_session(number))
        return name

    def session(self, name: Any) -> Session:
        if not isinstance(name, str) or name not in self.sessions:
            raise Refused(404, "no such session")
        return self.sessions[name]

    def put(self, name: Any, item_id: Any, side: Any, seconds: Any) -> None:
        """Store the answer to the session's next item; a second answer is refused and changes nothing."""
        session = self.session(name)
        if side not in _SIDES:
            raise Refused(400, "side must be left or right")
        if not _is_time(seconds):
            raise Refused(400, f"seconds must be a number of 0 .. {_LONGEST_SECONDS:g}")
        if item_id in session.answers:
            raise Refused(409, "this item has an answer")
        if session.next is None or session.next[0].id != item_id:
            raise Refused(409, "this is not the next item")
        item, swapped = session.next
        chosen = item.methods[(side == "right") != swapped]
        event = {"kind": "answer", "session": name, "item": item.id, "side": side, "chosen": chosen}
        event |= {"seconds": round(float(seconds), 2)}
        self._add(event)
        session.answers[item.id] = event


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
