"""The answers of a study: a file to which lines are only added, each on disk before the rater goes on.

A session belongs to a random name that its browser keeps; nothing about the person is stored. A line cut by a killed
server is left out, and its item is put again.
"""

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldmlab.disks import disk_errors
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
        content = self.path.read_bytes() if self.path.exists() else b""
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
                os.write(handle, b"\n" + line if self._torn else line)
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
